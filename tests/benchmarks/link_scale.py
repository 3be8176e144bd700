"""From a checkpoint to ONNX at the size of Stable Diffusion 1.4: tracing, linking, linking again, beside exporters.

    python tests/benchmarks/link_scale.py       writes tests/benchmarks/results/link_scale.json; needs 25 GB of disk
    ... --keep DIR          makes the random model in DIR, or finds it there
    ... --dynamo            torch's other exporter too, minutes
    ... --optimum PYTHON    an interpreter with optimum-onnx, which wants older libraries than erasec
    ... --size tiny         a model of a few MB: a trial, no benchmark

A random diffusers folder in float32 and two edits of rank 10 for its 32 K and V matrices. Each step runs in a fresh
process. "seconds" is the time that the step takes once everything is imported, "durable" that until the files are on
disk too (fsync of each), "process" the whole process; "peak_mb" the process's resident peak. "cold" has no graph in the
cache. "torch" is what this project did before: torch's exporter with all weights, UNet alone; "copy" a plain copy of
the checkpoint's bytes. "relink" is the command erasec relink. "check" is what a build does with what was linked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
from files_scale import copy, make
from machine import Record

RESULT = Path(__file__).parent / "results" / "link_scale.json"
GOALS = {"cold": 150.0, "cold_peak_mb": 5000.0, "warm": 60.0, "relink": 1.0, "relink_peak_mb": 300.0, "check": 30.0}
RANK = 10


def edited(folder: str, out: str, seed: str) -> Callable[[], None]:
    """A synthetic edit: its file, with tensors, and the merged checkpoint."""
    from naive import states

    from erasec import registry
    from erasec.base import Context
    from erasec.closed_form import solver
    from erasec.closed_form.base import ClosedForm, pack_system
    from erasec.closed_form.token_rows import uniform_weights
    from erasec.model import loading
    from erasec.targets.edit_file import EditFile

    def run() -> None:
        base, number = loading.load(folder), int(seed)
        width = base.streams["context"][0].shape[1]
        source, target, keep = (states(RANK, width, 10 * number + each) for each in (1, 2, 3))
        system = solver.weighted_system(source, target, uniform_weights(source), keep, uniform_weights(keep))
        kind = registry.load_pass("uce")
        assert issubclass(kind, ClosedForm)
        made = kind().edit_from_sums(base.streams, {f"edit{seed}": pack_system(system, "context")}, base.digest)
        view = base.with_edit(made)
        EditFile(sums=False, tensors=True).export(view, Path(out), Context())
        base.source.write(Path(out) / "merged", view.merged(), link=True)

    return run


def link(folder: str, base: str, edit: str, out: str, precision: str = "fp32", share: str = "") -> Callable[[], None]:
    """``linker.write`` of all four graphs, the tensors of the edit apart."""
    import torch  # noqa: F401

    from erasec.checkpoint.folder import Folder
    from erasec.commands import relink
    from erasec.graphs import link as linker
    from erasec.graphs.manifest import Origin

    _, sites = relink.read_edit(Path(edit))
    origin = Origin(dict.fromkeys(("text_encoder", "unet", "vae"), base), sites)
    other = Path(share) if share else None
    return lambda: linker.write_onnx(Folder(Path(folder)), Path(out), precision, origin=origin, share=other) and None


def relink(out: str, edit: str) -> Callable[[], None]:
    """The command line, as it is run: nothing is imported before."""

    def run() -> None:
        from erasec.cli import app as cli

        if code := cli.app(["relink", out, edit], standalone_mode=False):
            raise SystemExit(code)

    return run


def torch_unet(folder: str, out: str, dynamo: str = "") -> Callable[[], None]:
    """torch.onnx.export of the UNet with its weights."""
    import torch

    from erasec.checkpoint.folder import Folder
    from erasec.graphs.export import TRACED, sample_inputs
    from erasec.graphs.parity import load_module
    from erasec.graphs.signature import graphs

    def run() -> None:
        checkpoint = Folder(Path(folder))
        graph = next(each for each in graphs(checkpoint) if each.name == "unet")
        module, draw = load_module(checkpoint, graph), torch.Generator().manual_seed(0)
        given = sample_inputs(checkpoint, graph, TRACED, 300, draw)
        Path(out).mkdir()
        names: Any = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
        if dynamo:
            auto = torch.export.Dim.DYNAMIC
            names["dynamic_shapes"] = ({0: auto, 2: auto, 3: auto}, {}, {0: auto})
        else:
            names["dynamic_axes"] = {**graph.inputs, **graph.outputs}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(given.values()),
                str(Path(out) / "model.onnx"),
                opset_version=18,
                dynamo=bool(dynamo),
                **names,
            )

    return run


def check(folder: str, out: str, what: str) -> Callable[[], Record]:
    """The checks of the target onnx: bytes of all tensors, or outputs of all graphs; "loading" is part of "seconds"."""
    import diffusers  # noqa: F401
    import onnxruntime  # noqa: F401

    from erasec.checkpoint.folder import Folder
    from erasec.graphs import parity

    loading = 0.0

    def timed(load_module: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal loading
            start = time.perf_counter()
            loaded = load_module(*arguments)
            loading += time.perf_counter() - start
            return loaded

        return call

    def run() -> Record:
        parity.load_module, parity._open_session = timed(parity.load_module), timed(parity._open_session)
        compare = {"tensors": parity.compare_weights, "outputs": parity.compare_outputs}[what]
        checks = compare(Folder(Path(folder)), Path(out))
        if failed := [item.name for item in checks if not item.passed]:
            raise SystemExit(f"failed: {', '.join(failed)}")
        return {"loading": loading}

    return run


STEPS: dict[str, Callable[..., Callable[[], Record | None]]] = {
    "make": make,
    "edited": edited,
    "copy": copy,
    "link": link,
    "relink": relink,
    "torch": torch_unet,
    "check": check,
}


def step(name: str, written: str, *arguments: str) -> Record:
    """Time one step in this process."""
    return machine.step(STEPS[name](*arguments), written)


def fresh(cache: Path, name: str, written: str, *arguments: str) -> Record:
    """``step`` in a fresh process."""
    record = machine.fresh(__file__, name, written, *arguments, environment={"ERASEC_CACHE": str(cache)})
    print(f"{name} {Path(written).name}: {record['seconds']:.1f} s, {record['peak_mb']:.0f} MB", file=sys.stderr)
    return record


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def measure(place: Path, options: argparse.Namespace) -> Record:
    """Every step once, in turn."""
    model, cache = place / "model", place / "cache"
    if not model.is_dir():
        fresh(cache, "make", "", str(model), options.size)
    rows: dict[str, Record] = {}
    for number in ("1", "2"):
        shutil.rmtree(place / f"edit{number}", ignore_errors=True)
        fresh(cache, "edited", "", str(model), str(place / f"edit{number}"), number)
    edits = [str(next((place / f"edit{number}").glob("*.edit.safetensors"))) for number in (1, 2)]
    merged, second = place / "edit1/merged", place / "edit2/merged"
    digest = "0" * 64  # both are of one base, and this stands for it
    shutil.rmtree(cache, ignore_errors=True)
    out = {name: place / name for name in ("cold", "warm", "fp16", "shared", "copy", "torch", "dynamo", "optimum")}
    for folder in out.values():
        shutil.rmtree(folder, ignore_errors=True)

    def linked(name: str, folder: Path, edit: str, *more: str) -> None:
        rows[name] = fresh(cache, "link", str(out[name]), str(folder), digest, edit, str(out[name]), *more)
        rows[name]["mb"] = size(out[name])

    rows["copy"] = fresh(cache, "copy", str(out["copy"]), str(merged), str(out["copy"]))
    rows["copy"]["mb"] = size(out["copy"])
    shutil.rmtree(out["copy"])
    linked("cold", merged, edits[0])
    shutil.rmtree(out["cold"])
    linked("warm", merged, edits[0])
    linked("shared", second, edits[1], "fp32", str(out["warm"]))
    for number, name in ((1, "relink"), (0, "relink back"), (1, "relink again")):
        rows[name] = fresh(cache, "relink", str(out["warm"] / "unet"), str(out["warm"]), edits[number])
    same = [
        (out["shared"] / "unet" / name).read_bytes() == (out["warm"] / "unet" / name).read_bytes()
        for name in ("model.onnx", "model.edited.onnx_data")
    ]
    rows["relink"]["same as linked"] = all(same)
    rows["check tensors"] = fresh(cache, "check", "", str(second), str(out["warm"]), "tensors")
    rows["check outputs"] = fresh(cache, "check", "", str(second), str(out["warm"]), "outputs")
    for name in ("warm", "shared"):
        shutil.rmtree(out[name])
    linked("fp16", merged, edits[0], "fp16")
    shutil.rmtree(out["fp16"])
    rows["torch"] = fresh(cache, "torch", str(out["torch"]), str(merged), str(out["torch"]))
    shutil.rmtree(out["torch"])
    if options.dynamo:
        rows["dynamo"] = fresh(cache, "torch", str(out["dynamo"]), str(merged), str(out["dynamo"]), "dynamo")
        shutil.rmtree(out["dynamo"])
    if options.optimum:
        rows["optimum"] = optimum(options.optimum, merged, out["optimum"])
        shutil.rmtree(out["optimum"], ignore_errors=True)
    return rows


def optimum(python: str, folder: Path, out: Path) -> Record:
    """``optimum-cli export onnx``, its own validation included, in its own environment; the peak is of its process."""
    start = time.perf_counter()
    command = [
        python,
        "-m",
        "optimum.commands.optimum_cli",
        "export",
        "onnx",
        "-m",
        str(folder),
        "--task",
        "text-to-image",
        str(out),
    ]
    with subprocess.Popen(command) as running:
        _, code, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(code)
    if running.returncode:
        raise SystemExit(f"optimum failed with exit code {running.returncode}")
    return {"process": time.perf_counter() - start, "peak_mb": used.ru_maxrss / 1024, "mb": size(out)}


def verdict(rows: dict[str, Record]) -> Record:
    """What has a goal, beside it; and ratios in this run."""
    measured = {
        "cold": rows["cold"]["seconds"],
        "cold_peak_mb": rows["cold"]["peak_mb"],
        "warm": rows["warm"]["seconds"],
        "relink": rows["relink"]["process"],
        "relink_peak_mb": rows["relink"]["peak_mb"],
        "check": rows["check outputs"]["seconds"] - rows["check outputs"]["loading"],
    }
    ratios = {
        "torch's exporter (UNet) / linked from the cache (all)": rows["torch"]["seconds"] / rows["warm"]["seconds"],
        "torch's exporter (UNet) / relink, whole processes": rows["torch"]["process"] / rows["relink"]["process"],
        "linked from the cache / copy, until on disk": rows["warm"]["durable"] / rows["copy"]["durable"],
    }
    if "optimum" in rows:
        ratios["optimum / cold, whole processes"] = rows["optimum"]["process"] / rows["cold"]["process"]
        ratios["optimum / relink, whole processes"] = rows["optimum"]["process"] / rows["relink"]["process"]
    return {
        "measured": measured,
        "goals": GOALS,
        "missed": sorted(k for k in GOALS if measured[k] > GOALS[k]),
        "ratios": ratios,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--dynamo", action="store_true")
    parser.add_argument("--optimum", default="")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(step(*options.step)))
        return
    with ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        rows = measure(place, options)
    result = {"size": options.size, "machine": machine.about(), "rows": rows, **verdict(rows)}
    print(json.dumps({key: result[key] for key in ("measured", "missed", "ratios")}, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
