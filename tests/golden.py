"""Digests of everything that builds write, to compare two versions of the code: did a refactoring change a byte?

    python tests/golden.py before.json              in the old checkout
    python tests/golden.py after.json               in the new one, on the same machine
    python tests/golden.py --compare before.json after.json

Arithmetic differs between machines in its last bits, so the digests of one machine are no reference for another and
none are committed. Reports and model cards are prose and are left out, and so are manifests, which hold their
digests. Engines hold names that their builder draws at random, so only their size counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROSE = {"report.html", "report.json", "README.md", "erasec.manifest.json", "provenance.json", "bom.cdx.json"}
ENGINES = {"engine.json", "model.engine"}
LIMITS = """
[checks]
erased = 100.0
kept = 100.0
agreement = 100.0
drift = 100.0
recovered = 0.0
images = 1
steps = 2
"""
# What every build of the list is called, its model, its concepts, its passes and its targets.
TRAINED = "steps=2,batch=2"
ALL = ("hf", "ldm", "lora", "edit:tensors=true", "onnx", "openvino:weights=fp16", "triton", "trt-rtx")
BUILDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "uce": ("glyphs", ("star",), ("uce",), ALL),
    "uce-fp16": ("glyphs", ("heart",), ("uce:rows=last",), ("onnx:precision=fp16,vae=fp16", "openvino:weights=int8")),
    "rece": ("glyphs", ("star", "ring"), ("rece",), ("edit", "lora:rank=4", "ldm")),
    "mace": ("glyphs", ("star", "heart"), ("mace",), ("edit", "onnx")),
    "remap": ("glyphs", ("a blue umbrella",), ("trce.remap",), ("edit", "hf")),
    "esd": ("glyphs", ("star",), (f"esd:{TRAINED},trajectories=2,sample_steps=3",), ("edit", "ldm", "onnx")),
    "esd-rank": (
        "glyphs",
        ("star",),
        (f"esd:{TRAINED},trajectories=2,sample_steps=3,rank=2,train=full",),
        ("edit", "lora"),
    ),
    "kpop": ("glyphs", ("star",), (f"kpop:{TRAINED},trajectories=2,sample_steps=3",), ("edit", "onnx")),
    "trce": ("glyphs", ("star",), (f"trce:{TRAINED},trajectories=2,sample_steps=3",), ("edit",)),
    "steer": (
        "glyphs",
        ("star",),
        (f"trce.steer:{TRAINED},trajectories=2,sample_steps=3,early_fraction=0.5,reference=true",),
        ("edit",),
    ),
    "few_shot": (
        "glyphs",
        ("heart",),
        (f"few_shot:{TRAINED},images=1,sample_steps=3,min_cosine=0,max_rise=0",),
        ("edit", "onnx"),
    ),
    "safegen": ("glyphs", ("circle",), (f"safegen:{TRAINED},images=8,sample_steps=6",), ("edit", "ldm")),
    "eiup": ("glyphs", ("star",), ("eiup",), ("bundle", "onnx", "edit")),
    "geom": (
        "glyphs",
        ("watermark",),
        (f"geom_erasing:{TRAINED},images=24,sample_steps=6",),
        ("bundle", "onnx", "edit"),
    ),
    "random-sd1": ("sd1", ("church",), ("uce",), ("hf", "ldm", "lora", "edit", "onnx")),
    "random-sd2": ("sd2", ("church",), ("uce",), ("ldm", "lora", "edit", "openvino")),
    "random-sdxl": ("sdxl", ("van-gogh", "tench"), ("rece",), ("hf", "ldm", "lora", "edit")),
}


def erasec(*arguments: str, where: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "erasec", *arguments], cwd=where, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"erasec {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def random_model(family: str, out: Path) -> None:
    from random_models import random_folder

    random_folder(out, family, "tiny", dtype="float16")


def digests(root: Path) -> dict[str, str]:
    digested = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or (path.name in PROSE and "triton" not in name.parts):
            continue
        if path.name in ENGINES:
            digested[name.as_posix()] = (
                f"{path.stat().st_size} bytes" if path.suffix == ".engine" else "an engine's record"
            )
            continue
        content = path.read_bytes()
        if path.name == "recipe.toml":  # it names the folder that the model lay in
            content = re.sub(rb'model = ".*"', b"", content)
        digested[name.as_posix()] = hashlib.sha256(content).hexdigest()
    return digested


def build(name: str, where: Path) -> None:
    model, concepts, passes, targets = BUILDS[name]
    if model != "glyphs":
        random_model(model, where / model)
    recipe = where / f"{name}.toml"
    source = model if model == "glyphs" else (where / model).as_posix()
    recipe.write_text(f'erasec = "0.1"\nmodel = "{source}"\nerase = {json.dumps(concepts)}\n{LIMITS}')
    flags = [*(f"--pass={text}" for text in passes), *(f"--target={text}" for text in targets)]
    erasec("build", str(recipe), *flags, f"--out={name}", where=where)


def root_of(where: Path, name: str) -> Path:
    """Where a build lies: a few pictures at two steps show nothing, so that checks of them may fail."""
    return where / name if (where / name / "recipe.toml").is_file() else where / name / ".rejected"


def follow_up(where: Path) -> None:
    """What the other commands make of the builds."""
    uce = root_of(where, "uce").as_posix()
    star = f"{uce}/edit/star.edit.safetensors"
    flags = ("--pass", "uce:scale=0.5", "--target", "edit:tensors=true", "--out", "other")
    erasec("build", "glyphs", "--erase", "star", *flags, where=where)
    half = f"{root_of(where, 'other')}/edit/star.edit.safetensors"
    erasec("apply", star, "glyphs", "--out", "applied", where=where)
    erasec("relink", f"{uce}/onnx", half, "--out", "relinked", where=where)
    flags = ("--pass", "uce", "--target", "edit", "--out", "third")
    erasec("build", "glyphs", "--erase", "a blue umbrella", *flags, where=where)
    third = root_of(where, "third")
    erasec(
        "combine", star, f"{third}/edit/a-blue-umbrella.edit.safetensors", "--out", "both.edit.safetensors", where=where
    )
    (where / "captions.txt").write_text("a red circle\na blue square\n")
    erasec("prior", "glyphs", "captions.txt", "--out", "few.prior.safetensors", where=where)
    erasec("run", uce, "--prompt", "a red circle", "--steps", "3", "--out", "onnx.png", "--backend", "ort", where=where)
    erasec(
        "run", uce, "--prompt", "a red circle", "--steps", "3", "--out", "torch.png", "--backend", "torch", where=where
    )


def compare(one: Path, other: Path) -> None:
    before, after = (json.loads(path.read_text()) for path in (one, other))
    differ = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    for name in differ:
        print(name, "only in one" if name not in before or name not in after else "")
    print(f"{len(differ)} of {len(before.keys() | after.keys())} files differ")
    raise SystemExit(bool(differ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--compare", type=Path, nargs=2)
    parser.add_argument("--only", nargs="*", default=list(BUILDS))
    options = parser.parse_args()
    if options.compare:
        compare(*options.compare)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        os.environ["ERASEC_CACHE"] = str(where / ".cache")
        digested: dict[str, str] = {}
        for name in options.only:
            build(name, where)
            digested |= {f"{name}/{path}": digest for path, digest in digests(root_of(where, name)).items()}
            print(name, len(digested), file=sys.stderr, flush=True)
        options.out.write_text(json.dumps(digested, indent=1, sort_keys=True) + "\n")
        if "uce" in options.only:
            follow_up(where)
            for name in ("applied", "relinked"):
                digested |= {f"{name}/{path}": digest for path, digest in digests(where / name).items()}
            for name in ("both.edit.safetensors", "few.prior.safetensors", "onnx.png", "torch.png"):
                digested[name] = hashlib.sha256((where / name).read_bytes()).hexdigest()
    options.out.write_text(json.dumps(digested, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
