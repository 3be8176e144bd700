"""The commands of docs/tutorial.md run in their order, and do what the page says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from erasec.cli.app import QUIET, app

# Blocks that the reader runs, and files that the reader saves.
STEP = re.compile(r"^```(?:sh\n|toml title=\"([^\"]+)\"\n)(.*?)^```", re.MULTILINE | re.DOTALL)
EXIT_CODE = re.compile(r"# exit code (\d+)")
# In the quick test, two pictures of four steps for each group, with limits that no chance exceeds.
QUICK = {"images": 2, "steps": 4, "erased": 10.0, "kept": 1.0, "agreement": 1.0, "drift": 1.0}

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one line of the page in an empty folder, compares its exit code, and returns what it prints on stdout."""
    monkeypatch.chdir(tmp_path)
    for name in QUIET:
        monkeypatch.setenv(name, "")  # so that what the program sets is taken back
        monkeypatch.delenv(name)

    def run(line: str) -> str:
        words, wanted = shlex.split(line, comments=True), EXIT_CODE.search(line)
        if words[0] == "erasec":
            result = CliRunner().invoke(app, words[1:])
            code, stdout, output = result.exit_code, result.stdout, result.output
        else:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            code, stdout, output = done.returncode, done.stdout, done.stdout + done.stderr
        assert code == (int(wanted[1]) if wanted else 0), f"{line}\n{output}"
        return stdout

    return run


def steps(root: Path) -> list[tuple[str, str]]:
    """The blocks of the page in their order: the name of a file, or "" for commands; and the text."""
    return STEP.findall((root / "docs/tutorial.md").read_text(encoding="utf-8"))


def follow(root: Path, run: Run, quick: bool) -> dict[str, str]:
    """Do what the page says; what each command printed. If ``quick``, without attacks, and with the settings QUICK."""
    printed: dict[str, str] = {}
    Path("quick.toml").write_text(tomli_w.dumps({"erasec": "0.1", "model": "glyphs", "checks": QUICK}))
    for file, text in steps(root):
        if file:
            content: dict[str, Any] = tomllib.loads(text)
            if quick:
                content["checks"] |= QUICK
                content["targets"] = []  # the first build has written graphs
            Path(file).write_text(tomli_w.dumps(content) if quick else text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if quick and "audit" in line:
                continue
            used = re.sub(r"^(erasec (?:build|plan)) glyphs", r"\1 quick.toml", line) if quick else line
            printed[line] = run(used)
    return printed


def built(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    return content


def check_results(printed: dict[str, str]) -> None:
    """What the page says about the files that are there, and about what is printed."""
    assert all(built(folder)["outcome"] == "passed" for folder in ("glyphs-without-star", "star", "release"))
    assert all(Path("glyphs-without-star", name).is_dir() for name in ("hf", "onnx"))
    assert Path("star.png").is_file() and Path("release/model.sig").is_file()
    verified = next(text for line, text in printed.items() if line.startswith("erasec verify"))
    assert verified.splitlines()[-1] == "verified"


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the page makes a key with openssl")


@needs_openssl
def test_the_tutorial_without_its_attacks(root: Path, run: Run) -> None:
    check_results(follow(root, run, quick=True))


@pytest.mark.slow
@needs_openssl
def test_the_whole_tutorial(root: Path, run: Run) -> None:
    printed = follow(root, run, quick=False)
    check_results(printed)
    rates = {group: mean["after"] for group, mean in built("glyphs-without-star")["summary"].items()}
    assert all(rates[group] <= 0.05 for group in ("name", "synonym", "implicit")) and rates["keep"] >= 0.9
    audit = json.loads(Path("star.audit/audit.json").read_text())
    assert [(gate["name"], gate["outcome"]) for gate in audit["gates"]] == [("inversion", "failed")]
    assert built("gated/.rejected")["outcome"] == "rejected"


def test_the_page_has_the_steps_that_are_run(root: Path) -> None:
    lines = [line for file, text in steps(root) if not file for line in text.splitlines()]
    commands = {line.split()[1] for line in lines if line.startswith("erasec ")}
    assert commands == {"plan", "build", "run", "explain", "check", "verify", "audit"}
    assert [file for file, _ in steps(root) if file] == ["star.toml"]
