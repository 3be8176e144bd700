"""Time and memory from an edit file to files on disk, at the size of Stable Diffusion 1.4, beside plain copies.

    python tests/benchmarks/files_scale.py       writes tests/benchmarks/results/files_scale.json; needs 18 GB of disk
    ... --keep DIR      makes the random model, its single file and the edit file in DIR, or finds them there
    ... --size tiny     a model of a few MB: a trial, no benchmark

A random diffusers folder in float32 and an edit file of rank 10 for its 32 K and V matrices. Each step runs in a fresh
process, in turn, --rounds times; the figures are medians. "seconds" is the time that the step takes once everything is
imported, for erasec from the parsing of its command line on; "durable" is that until the files are on disk too (fsync
of each); "process" the whole process, imports included. ``apply`` writes the sha256 of what it writes, so it is
compared with a copy whose files are hashed one after another. "peak_mb" is the process's resident peak, VmHWM:
ru_maxrss would inherit that of its parent. What is measured is the disk where DIR or TMPDIR lies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
from machine import Record

RESULT = Path(__file__).parent / "results" / "files_scale.json"
GOALS = {"ratio": 1.3, "in_place": 1.0, "peak_mb": 600.0}
UNET = "unet/diffusion_pytorch_model.safetensors"
RANK = 10


def make(folder: str, size: str) -> Callable[[], None]:
    """A random SD 1.4."""
    from random_models import random_folder

    return lambda: random_folder(Path(folder), "sd1", size)


def solve(folder: str, file: str) -> Callable[[], None]:
    """An edit file for it, from synthetic token states."""
    from naive import states

    from erasec import registry
    from erasec.closed_form import solver
    from erasec.closed_form.base import ClosedForm, pack_system
    from erasec.closed_form.token_rows import uniform_weights
    from erasec.model import edit_file, loading

    def run() -> None:
        base = loading.load(folder)
        width = base.streams["context"][0].shape[1]
        source, target, keep = (states(RANK, width, seed) for seed in (1, 2, 3))
        system = solver.weighted_system(source, target, uniform_weights(source), keep, uniform_weights(keep))
        kind = registry.load_pass("uce")
        assert issubclass(kind, ClosedForm)
        made = kind().edit_from_sums(base.streams, {"synthetic": pack_system(system, "context")}, "")
        edit_file.write_edits(Path(file), [made], base.with_edit(made).base_record())

    return run


def single(folder: str, out: str) -> Callable[[], None]:
    """The folder as a single file, in ``out``/model.safetensors."""
    from erasec import registry
    from erasec.base import Context
    from erasec.checkpoint.folder import Folder

    target: Any = registry.load_target("ldm")()
    return lambda: target.export(Folder(Path(folder)), Path(out), Context()) and None


def copy(source: str, out: str) -> Callable[[], None]:
    """A plain copy of a file or a folder."""

    def run() -> None:
        if Path(source).is_dir():
            shutil.copytree(source, out)
        else:
            shutil.copyfile(source, out)

    return run


def copy_digest(source: str, out: str) -> Callable[[], None]:
    """A plain copy, and then the sha256 of each of its files."""
    from erasec.checkpoint.safetensors import file_digest

    def run() -> None:
        copy(source, out)()
        for file in (Path(out), *Path(out).rglob("*")):
            if file.is_file():
                file_digest(file)

    return run


def apply(*arguments: str) -> Callable[[], None]:
    """``erasec apply`` with these arguments."""
    import torch  # noqa: F401

    from erasec.cli import app as cli
    from erasec.commands import (
        plan,  # noqa: F401
    )

    def run() -> None:
        if code := cli.app(["apply", *arguments], standalone_mode=False):
            raise SystemExit(code)

    return run


STEPS: dict[str, Callable[..., Callable[[], Record | None]]] = {
    "make": make,
    "solve": solve,
    "single": single,
    "copy": copy,
    "copy_digest": copy_digest,
    "apply": apply,
}


def step(name: str, written: str, *arguments: str) -> Record:
    """Time one step in this process."""
    return machine.step(STEPS[name](*arguments), written)


def fresh(*arguments: str) -> Record:
    """``step`` in a fresh process."""
    return machine.fresh(__file__, *arguments)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def one_round(place: Path, run: Callable[..., Record]) -> tuple[dict[str, Record], dict[str, str]]:
    """Every step once, and the digests of what the steps of erasec wrote. Those of a single file are of its tensors:
    a new file states its digest in its header, and one that is edited in place has room for none."""
    from erasec.checkpoint.safetensors import content_digest, file_digest, read_header

    model, edit, file = place / "model", str(place / "synthetic.edit.safetensors"), place / "single/model.safetensors"
    out, copied, out_file = place / "out", place / "copy", place / "out.safetensors"
    rows: dict[str, Record] = {}
    digests: dict[str, str] = {}
    os.sync()
    rows["copy_digest"] = run("copy_digest", str(copied), str(model), str(copied))
    remove(copied)
    rows["copy"] = run("copy", str(copied), str(model), str(copied))
    rows["in_place"] = run("apply", str(copied / UNET), edit, str(copied), "--in-place")
    digests["in_place"] = file_digest(copied / UNET)
    remove(copied)
    for name, more in (("apply", ()), ("link", ("--link",))):
        rows[name] = run("apply", str(out), edit, str(model), "--out", str(out), *more)
        digests[name] = file_digest(out / UNET)
        remove(out)
    rows["copy_unet"] = run("copy", str(out_file), str(model / UNET), str(out_file))
    remove(out_file)
    rows["copy_digest_single"] = run("copy_digest", str(out_file), str(file), str(out_file))
    remove(out_file)
    rows["copy_single"] = run("copy", str(out_file), str(file), str(out_file))
    rows["in_place_single"] = run("apply", str(out_file), edit, str(out_file), "--in-place")
    digests["in_place_single"] = content_digest(read_header(out_file)[0])
    remove(out_file)
    rows["apply_single"] = run("apply", str(out_file), edit, str(file), "--out", str(out_file))
    digests["apply_single"] = content_digest(read_header(out_file)[0])
    remove(out_file)
    digests |= {"base": file_digest(model / UNET), "base_single": content_digest(read_header(file)[0])}
    return rows, digests


def agree(digests: Mapping[str, str]) -> bool:
    """Whether all ways of applying the edit wrote the same, and not what the base has."""
    folder = {digests[name] for name in ("in_place", "apply", "link")}
    file = {digests[name] for name in ("in_place_single", "apply_single")}
    return len(folder) == len(file) == 1 and digests["base"] not in folder and digests["base_single"] not in file


def summary(runs: Sequence[Mapping[str, Record]]) -> dict[str, Record]:
    """Medians of the times and the highest of the peaks, by step."""
    medians: dict[str, Record] = {}
    for name in runs[0]:
        own = [run[name] for run in runs]
        medians[name] = {key: statistics.median(one[key] for one in own) for key in own[0] if key != "peak_mb"}
        medians[name]["peak_mb"] = max(one["peak_mb"] for one in own)
        medians[name]["runs"] = [one["seconds"] for one in own]
    return medians


def verdict(rows: Mapping[str, Record]) -> Record:
    """The figures that have goals, and those that miss them."""
    pairs = {"apply": "copy_digest", "apply_single": "copy_digest_single"}
    ratios = {
        f"{name} / {other}, {key}": rows[name][key] / rows[other][key]
        for name, other in pairs.items()
        for key in ("seconds", "durable")
    }
    held = [name for name in rows if not name.startswith("copy")]
    over = [what for what, ratio in ratios.items() if ratio > GOALS["ratio"]]
    over += [name for name in ("in_place", "in_place_single") if rows[name]["seconds"] > GOALS["in_place"]]
    over += [f"{name} peak" for name in held if rows[name]["peak_mb"] > GOALS["peak_mb"]]
    return {"ratios": ratios, "goals": GOALS, "over": over}


def main(arguments: Sequence[str] | None = None, run: Callable[..., Record] = fresh) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="where the models lie, and stay (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, help="JSON to write (default: RESULT at full size)")
    parser.add_argument("--step", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.step:
        print(json.dumps(step(*chosen.step)))
        return
    with ExitStack() as stack:
        place = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        model, edit = place / "model", place / "synthetic.edit.safetensors"
        made = {}
        for name, path, given in (
            ("make", model, (str(model), chosen.size)),
            ("solve", edit, (str(model), str(edit))),
            ("single", place / "single", (str(model), str(place / "single"))),
        ):
            if not path.exists():
                made[name] = run(name, str(path), *given)
        rounds = [one_round(place, run) for _ in range(chosen.rounds)]
        sizes = {"model": sum(file.stat().st_size for file in model.rglob("*") if file.is_file())}
        sizes |= {"unet": (model / UNET).stat().st_size, "edit": edit.stat().st_size}
    rows = summary([row for row, _ in rounds])
    result = {
        "rows": rows,
        "made": made,
        **verdict(rows),
        "same_bytes": all(agree(digests) for _, digests in rounds),
        "bytes": sizes,
        "rounds": chosen.rounds,
        "size": chosen.size,
        "machine": machine.about(),
    }
    print("| step | seconds | on disk | whole process | peak MB |\n|---|---|---|---|---|")
    for name, row in (made | rows).items():
        times = " | ".join(f"{row[key]:.2f}" for key in ("seconds", "durable", "process"))
        print(f"| {name} | {times} | {row['peak_mb']:.0f} |")
    for what, ratio in result["ratios"].items():
        print(f"{what}: {ratio:.2f} (≤ {GOALS['ratio']})")
    print("all ways wrote the same bytes" if result["same_bytes"] else "OVER: NOT THE SAME BYTES")
    print(f"OVER: {', '.join(result['over'])}" if result["over"] else "all goals are met")
    out = chosen.out or (RESULT if chosen.size == "full" else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
