"""``erasec check`` sees one flipped byte in any file of a build of every target that a CPU can write.

    pytest -m slow tests/robustness/test_flips.py

The build and the flips that were tried are kept in the folder ERASEC_ROBUSTNESS, by default one for temporary files. An
interrupted run continues there. Delete that folder to begin anew, or after the code has changed.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from erasec.checkpoint import manifest
from erasec.cli.app import app
from erasec.errors import CHECK_FAILED

pytestmark = pytest.mark.slow

WORK = Path(os.environ.get("ERASEC_ROBUSTNESS", Path(tempfile.gettempdir()) / "erasec-robustness"))
FLIPS = int(os.environ.get("ERASEC_FLIPS", "200"))
TARGETS = ("hf", "ldm", "lora", "edit:tensors=true", "onnx", "openvino:weights=fp16", "triton")
# Pictures are not the point here: there are few of them, and no limit is tight.
RECIPE = f"""
erasec = "0.1"
model = "glyphs"
erase = ["star"]
targets = {json.dumps(TARGETS)}
[checks]
erased = 100.0
kept = 100.0
agreement = 100.0
drift = 100.0
images = 2
"""


def check(path: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", str(path)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def out() -> Path:
    """The build, which is made once and stays whole between flips."""
    out = WORK / "build"
    if not (out / manifest.FILE).is_file():
        WORK.mkdir(parents=True, exist_ok=True)
        (WORK / "recipe.toml").write_text(RECIPE)
        done = CliRunner().invoke(app, ["build", str(WORK / "recipe.toml"), "--out", str(out)])
        assert done.exit_code == 0, done.output
    return out


@contextmanager
def flipped(file: Path, place: int, bit: int) -> Iterator[None]:
    """One bit of a file is flipped in the block, and restored after it."""

    def flip() -> None:
        with file.open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0] ^ (1 << bit)
            stream.seek(place)
            stream.write(bytes([byte]))

    flip()
    try:
        yield
    finally:
        flip()


def test_every_flipped_byte_is_seen(out: Path) -> None:
    journal = WORK / "flips.jsonl"
    pending = WORK / "pending.json"  # a flip whose restoring a kill may have prevented
    if pending.exists():
        file, place, bit, good = json.loads(pending.read_text())
        if (out / file).read_bytes()[place] != good:
            with (out / file).open("r+b") as stream:
                stream.seek(place)
                stream.write(bytes([good]))
        pending.unlink()
    differences = manifest.compare(out, manifest.read(out)[0])
    assert differences.all == ()
    tried = {json.loads(line)["number"] for line in journal.read_text().splitlines()} if journal.exists() else set()
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert {file.relative_to(out).parts[0] for file in files} > {target.split(":")[0] for target in TARGETS}
    for number in (number for number in range(FLIPS) if number not in tried):
        rng = random.Random(number)
        by_size = number % 2  # half of the flips hit small files as often as large ones
        (file,) = rng.choices(files, [path.stat().st_size if by_size else 1 for path in files])
        name, place, bit = file.relative_to(out), rng.randrange(file.stat().st_size), rng.randrange(8)
        start = rng.choice([path for path in (file, *file.parents) if path != out and path.is_relative_to(out)])
        good = file.read_bytes()[place]
        pending.write_text(json.dumps([name.as_posix(), place, bit, good]))
        with flipped(file, place, bit):
            code, output = check(start)
        pending.unlink()
        seen = code == CHECK_FAILED and (name.as_posix() in output.replace("\n", "") or name.name == manifest.FILE)
        record = {"number": number, "file": name.as_posix(), "place": place, "bit": bit, "seen": seen}
        with journal.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(records) >= FLIPS
    assert [record for record in records if not record["seen"]] == []


def test_the_whole_build_passes(out: Path) -> None:
    code, output = check(out)
    assert code == 0, output
