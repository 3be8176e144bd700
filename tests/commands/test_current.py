"""A build that would write what is there already does nothing; whatever differs is built."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erasec.cli.app import app
from erasec.commands import current as module
from erasec.commands.current import current, inputs
from erasec.commands.plan import Plan, make_plan
from erasec.recipe.recipe import Recipe

NO_PICTURES = ("--pictures", "0")


def plan(model: Path, out: Path, **fields: Any) -> Plan:
    return make_plan(Recipe(model=str(model), **{"erase": ("star",), "checks": {"pictures": 0}, **fields}), out)


@pytest.fixture(scope="module")
def out(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("current") / "out"
    build(random_folder, folder)
    return folder


def build(model: Path, out: Path, *flags: str) -> None:
    words = ["build", str(model), "--erase", "star", *NO_PICTURES, "--out", str(out), *flags]
    app(words, standalone_mode=False)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_same_build_does_nothing_and_says_the_same(
    random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(random_folder, tmp_path / "out")
    first, before = capsys.readouterr(), snapshot(tmp_path / "out")
    build(random_folder, tmp_path / "out")
    second = capsys.readouterr()
    assert snapshot(tmp_path / "out") == before
    assert second.out == first.out and "is up to date" in second.err and "is up to date" not in first.err
    build(random_folder, tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert snapshot(tmp_path / "out") == before
    build(random_folder, tmp_path / "out", "--fresh")
    assert snapshot(tmp_path / "out") != before and "is up to date" not in capsys.readouterr().err


def test_a_build_that_does_nothing_loads_no_torch(random_folder: Path, out: Path) -> None:
    words = ["build", str(random_folder), "--erase", "star", *NO_PICTURES, "--out", str(out)]
    code = "import sys; from erasec.cli.app import app\n"
    code += "try: app(sys.argv[1:], standalone_mode=False)\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "is up to date" in done.stderr and done.stderr.splitlines()[-1] == "False"


def test_the_folder_is_current_for_its_own_plan_alone(random_folder: Path, out: Path) -> None:
    facts = current(plan(random_folder, out))
    assert facts is not None and facts["outcome"] == "not judged"
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"erase": ("heart",)},
        {"targets": ("ldm",)},
        {"pass": ({"name": "uce", "options": {"keep": 3.0}},)},
        {"checks": {"pictures": 0, "kept": 0.5}},
    ]
    for fields in others:
        assert current(plan(random_folder, out, **fields)) is None, fields
    assert current(plan(random_folder, out.parent / "elsewhere")) is None


@pytest.mark.parametrize("name", ["code_digest", "collect"])
def test_another_version_builds_again(
    random_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "collect":
        monkeypatch.setattr(module.collect, "environment", lambda: {"torch": "9"})
    else:
        monkeypatch.setattr(module, name, lambda: "another")
    assert current(plan(random_folder, out)) is None


def test_a_file_that_changed_was_lost_or_was_added_is_built_again(random_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    build(random_folder, folder)
    planned = plan(random_folder, folder)
    for name in ("hf/unet/config.json", "report.html", "report.json", "erasec.manifest.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + b"  ")
        assert current(planned) is None, name
        (folder / name).unlink()
        assert current(planned) is None, name
        (folder / name).write_bytes(content)
        assert current(planned) is not None
    (folder / "hf" / "new.txt").touch()
    assert current(planned) is None


def test_the_content_of_a_file_that_a_recipe_names_counts(random_folder: Path, tmp_path: Path) -> None:
    own, digests = tmp_path / "own_target.py", []
    for text in ("# one", "# two"):
        own.write_text(text)
        planned = plan(random_folder, tmp_path / "out")
        changed = planned.recipe.model_copy(update={"targets": (f"{own}:Own:level=3",)})
        digests.append(inputs(replace(planned, recipe=changed)))
    assert digests[0] != digests[1]
