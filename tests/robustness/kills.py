"""Kill -9 at random moments of commands that write: their output must be the old or the new, and nothing may be left.

    python tests/robustness/kills.py --kills 200 --work DIR
        appends one line for each kill to DIR/kills.jsonl; run again with the same DIR, it goes on where it stopped
    ... --command relink      kills of one command only

The model has random weights in the layout of glyphs. A kill comes at a random moment of the whole process, or, every
second time, of the part in which the working folder is there. Then the next command runs, and the folder of the
output, TMPDIR and the cache are compared with what they should hold. The exit code is 1 if any kill left a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erasec.checkpoint import manifest
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import PROVENANCE

TESTS = Path(__file__).resolve().parent.parent
# They state seconds and paths, or digests of files that do.
NOT_THE_SAME = {"report.json", "report.html", "README.md", "recipe.toml", BOM, PROVENANCE, manifest.FILE}
COMMANDS = ("build", "apply", "relink", "combine")


def environment(work: Path) -> dict[str, str]:
    for name in ("tmp", "cache"):
        (work / name).mkdir(parents=True, exist_ok=True)
    source = os.pathsep.join(map(str, (TESTS.parent / "src", TESTS)))
    own = {"PYTHONPATH": source, "TMPDIR": str(work / "tmp"), "ERASEC_CACHE": str(work / "cache")}
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **own}


def start(work: Path, words: Sequence[object]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "erasec", *map(str, words)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment(work), cwd=work, stdout=quiet, stderr=quiet)


def prepare(work: Path) -> None:
    """A model, and two builds of it with different edits, from which all commands start."""
    if (work / "ready").exists():
        return
    code = (
        "import sys; from pathlib import Path; from random_models import random_pipeline as write; write(Path('model'))"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(work), cwd=work, check=True)
    for concept in ("star", "heart"):
        words = ["build", "model", "--erase", concept, "--target", "edit:tensors=true", "--target", "onnx"]
        assert start(work, [*words, "--device", "cpu", "--out", concept]).wait() == 0, f"no build of {concept}"
    (work / "ready").touch()


def digest(path: Path) -> str:
    """sha256 of a file, or of the names and bytes of a folder's files; "" where there is nothing."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in NOT_THE_SAME]
    lines = (f"{file.relative_to(path)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if files else ""


def is_whole(path: Path) -> bool:
    """Whether a folder holds exactly the files of its manifest; a file, or a folder without one, counts as whole."""
    return not (path / manifest.FILE).is_file() or not manifest.compare(path, manifest.read(path)[0]).all


def words_of(command: str, work: Path, out: Path) -> list[object]:
    edits = [work / name / "edit" / f"{name}.edit.safetensors" for name in ("star", "heart")]
    build = ["build", "model", "--erase", "heart", "--target", "edit:tensors=true", "--device", "cpu", "--out", out]
    return {
        "build": build,
        "apply": ["apply", edits[1], "model", "--out", out],
        "relink": ["relink", out, edits[1]],
        "combine": ["combine", edits[1], "--out", out],  # those of star and heart keep each other
    }[command]


def put_old(command: str, work: Path, out: Path, old: bool) -> None:
    """Put what the command replaces at ``out``: an earlier build, an ONNX folder, or nothing."""
    if command == "relink":
        shutil.copytree(work / "star" / "onnx", out)
    elif command == "build" and old:
        shutil.copytree(work / "earlier", out)


def measure(work: Path) -> dict[str, dict[str, Any]]:
    """For each command, how long it runs, when its working folder appears, and the digest of what it writes."""
    file = work / "measured.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    words = words_of("build", work, work / "earlier")
    assert start(work, ["star" if word == "heart" else word for word in words]).wait() == 0
    measured = {}
    for command in COMMANDS:
        out = work / "measure" / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        put_old(command, work, out, False)
        began, appeared = time.monotonic(), 0.0
        process = start(work, words_of(command, work, out))
        while process.poll() is None:
            if not appeared and (out.parent / ".out.erasec").exists():
                appeared = time.monotonic() - began
            time.sleep(0.002)
        assert process.returncode == 0, f"{command} failed"
        measured[command] = {"seconds": time.monotonic() - began, "working": appeared, "new": digest(out)}
        shutil.rmtree(out.parent)
    file.write_text(json.dumps(measured))
    return measured


def kill_one(
    number: int, work: Path, measured: Mapping[str, Mapping[str, Any]], commands: Sequence[str]
) -> dict[str, Any]:
    """One kill, the same for the same number: what was found after it, and after the next command."""
    draw, command = random.Random(number), commands[number % len(commands)]
    old, aimed = draw.random() < 0.5, number // len(commands) % 2 == 1
    folder = work / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    out = folder / "out"
    put_old(command, work, out, old)
    before, figures = digest(out), measured[command]
    process = start(work, words_of(command, work, out))
    began = time.monotonic()
    if aimed:
        while process.poll() is None and not (folder / ".out.erasec").exists():
            time.sleep(0.001)
        wait = draw.uniform(0, 1.05 * (figures["seconds"] - figures["working"]))
    else:
        wait = draw.uniform(0, 1.05 * figures["seconds"])
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
    ended, seconds = process.wait(), time.monotonic() - began
    digests, whole = {digest(out)}, is_whole(out)
    left = sorted(path.name for path in folder.iterdir() if path != out)
    start(work, ["recover", out]).wait()  # any command that is given the path
    digests.add(digest(out))
    names = {before: "old", figures["new"]: "new"}
    states = sorted({names.get(state, "none" if not state else "mixed") for state in digests})
    if not (whole and is_whole(out)):
        states = ["mixed"]
    remains = sorted(
        path.relative_to(work).as_posix()
        for path in (*folder.iterdir(), *(work / "tmp").glob("*erasec*"), *(work / "cache").glob("*/erasec-*"))
        if path != out
    )
    return {
        "number": number,
        "command": command,
        "had_old": bool(before),
        "killed": ended == -9,
        "seconds": round(seconds, 3),
        "left_by_the_kill": left,
        "states": states,
        "left_after_the_next_command": remains,
        "fault": len(states) != 1 or states[0] not in ("old", "new") or bool(remains),
    }


def sweep(work: Path, kills: int, commands: Sequence[str] = COMMANDS) -> list[dict[str, Any]]:
    """Go on until ``kills`` runs were killed before they had ended; returns the records of all runs."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    measured, file = measure(work), work / "kills.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    while sum(record["killed"] for record in records) < kills:
        records.append(kill_one(len(records), work, measured, commands))
        with file.open("a") as stream:
            stream.write(json.dumps(records[-1]) + "\n")
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=TESTS.parent / "build" / "kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--command", choices=COMMANDS, action="append")
    given = parser.parse_args()
    records = sweep(given.work, given.kills, given.command or COMMANDS)
    for command in COMMANDS:
        own = [record for record in records if record["command"] == command]
        states = Counter(state for record in own for state in record["states"])
        killed, dirty = sum(record["killed"] for record in own), sum(bool(record["left_by_the_kill"]) for record in own)
        print(f"{command:8} {len(own)} runs, {killed} killed, {dirty} with a working folder left, then {dict(states)}")
    faults = [record for record in records if record["fault"]]
    for record in faults:
        print(json.dumps(record))
    print(f"{len(faults)} faults in {len(records)} runs")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
