"""A build that would write what is there already does nothing; whatever differs is built."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from erasec.cli.app import app
from erasec.commands import build as build_module
from erasec.commands import current as module
from erasec.commands import plan as plan_module
from erasec.commands.current import current, inputs, recipe_files
from erasec.commands.plan import Plan, make_plan
from erasec.recipe.concept import Concept
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


def own_target(root: Path, folder: Path) -> Path:
    file = folder / "own_target.py"
    file.write_text((root / "examples" / "my_target.py").read_text())
    return file


def test_the_content_of_a_file_that_a_recipe_names_counts(root: Path, random_folder: Path, tmp_path: Path) -> None:
    file, digests = own_target(root, tmp_path), []
    for text in ("# one", "# two"):
        file.write_text(f"{file.read_text()}\n{text}\n")
        digests.append(inputs(plan(random_folder, tmp_path / "out", targets=(f"{file}:Npz",))))
    assert digests[0] != digests[1]


def test_a_file_that_changes_while_a_build_runs_is_built_again(
    root: Path, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, solve = own_target(root, tmp_path), build_module._solve

    def edit_and_solve(*arguments: Any) -> Any:
        file.write_text(file.read_text() + "# edited\n")
        return solve(*arguments)

    monkeypatch.setattr(build_module, "_solve", edit_and_solve)
    out, fields = tmp_path / "out", {"targets": (f"{file}:Npz",)}
    build_module.run(plan(random_folder, out, **fields))
    assert current(plan(random_folder, out, **fields)) is None
    monkeypatch.undo()
    build_module.run(plan(random_folder, out, **fields))
    assert current(plan(random_folder, out, **fields)) is not None


def test_a_file_that_changes_while_it_is_planned_is_built_again(
    root: Path, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, load = own_target(root, tmp_path), plan_module.make_target
    fields = {"targets": (f"{file}:Npz",)}

    def load_and_edit(text: str) -> Any:
        target = load(text)
        file.write_text(file.read_text() + "# edited\n")
        return target

    monkeypatch.setattr(plan_module, "make_target", load_and_edit)
    early = plan(random_folder, tmp_path / "out", **fields)
    monkeypatch.undo()
    assert early.files_read != plan(random_folder, tmp_path / "out", **fields).files_read


@pytest.mark.parametrize("phrase", ["~uwu", "cats,~50", "кот" * 50, "a\0b", "x" * 300])
def test_phrases_are_no_paths(random_folder: Path, here: Path, phrase: str) -> None:
    """Nor is one that a file or a folder has as its name: a build may not read, or wait for, what lies there."""
    for name in ("star", "ring"):
        (here / name).mkdir()
        (here / name / "content").touch()
    concept = Concept(name="star", erase=("star",), keep=("ring",), implicit=(phrase,))
    planned = plan(random_folder, here / "out", concept=(concept,))
    assert len(inputs(planned)) == 64 and not planned.files_read


def test_folders_that_options_name_are_read(here: Path) -> None:
    (here / "judge").mkdir()
    (here / "judge" / "weights").write_text("w")
    (here / "keys").touch()
    uses: list[dict[str, Any]] = [
        {"judge": "clip:folder=judge"},
        {"pass": ({"name": "few_shot", "options": {"images": "judge"}},)},
        {"concept": (Concept(name="star", erase=("star",), judge={"clip": {"folder": "judge"}}),)},
    ]
    for fields in uses:
        recipe = Recipe(model="glyphs", erase=("star",), keys=("keys",), **fields)
        assert recipe_files(recipe).keys() == {"judge/weights", "keys"}


def test_where_processes_train_together_every_build_runs(
    random_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other processes have begun by then, and wait for the main one."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert current(plan(random_folder, out)) is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert current(plan(random_folder, out)) is None


@pytest.mark.parametrize("name", ["nudenet", "openvino", "tensorrt", "tensorrt_rtx", "onnx", "bitsandbytes", "pillow"])
def test_another_version_of_a_library_builds_again(
    random_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    planned, version = plan(random_folder, out), metadata.version
    assert current(planned) is not None
    monkeypatch.setattr(metadata, "version", lambda other: "99.0" if other == name else version(other))
    assert current(planned) is None


def test_another_version_of_a_plugin_or_another_gpu_builds_again(
    random_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(random_folder, out)
    for where, name, value in (
        (module.registry, "distributions", lambda: {"their-package": "2.0"}),
        (module, "visible_models", lambda: ["NVIDIA L4 89"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert current(planned) is None, name
    assert current(planned) is not None
