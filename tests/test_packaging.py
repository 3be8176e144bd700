from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import resources
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import erasec


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(root: Path) -> list[Requirement]:
    return [Requirement(line) for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines()]


def test_no_generic_name_is_installed(root: Path) -> None:
    path = [folder for folder in sys.path if Path(folder or ".").resolve() != root]
    assert PathFinder.find_spec("erasec", path) is not None
    for name in ("compiler", "passes", "targets", "tests", "examples"):
        assert PathFinder.find_spec(name, path) is None, f"import {name} works, and should not"


def test_every_package_folder_is_listed(root: Path, project: dict[str, Any]) -> None:
    inits = [*root.glob("compiler/**/__init__.py"), root / "passes/__init__.py", root / "targets/__init__.py"]
    folders = (init.parent.relative_to(root).as_posix().replace("/", ".") for init in inits)
    names = {re.sub(r"^(?=passes|targets)", "erasec.", re.sub(r"^compiler", "erasec", name)) for name in folders}
    assert names == set(project["tool"]["setuptools"]["packages"])


def test_package_data_is_installed(root: Path, project: dict[str, Any]) -> None:
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        installed = Path(str(resources.files(package)))
        folder = root / "compiler" / Path(*package.split(".")[1:])
        for pattern in patterns:
            expected = {file.relative_to(folder) for file in folder.glob(pattern)}
            assert expected, f"{package}: no file matches {pattern}"
            assert all((installed / file).is_file() for file in expected)


def test_version_is_the_project_s(project: dict[str, Any]) -> None:
    assert importlib.metadata.version("erasec") == project["project"]["version"]


def test_the_changelog_knows_the_version(root: Path, project: dict[str, Any]) -> None:
    assert f"## [{project['project']['version']}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_torch_is_pinned_first(pins: list[Requirement]) -> None:
    assert str(pins[0]) == "torch==2.13.0"


def test_every_requirement_has_an_exact_pin_in_its_range(project: dict[str, Any], pins: list[Requirement]) -> None:
    exact = {canonicalize_name(pin.name): [spec.version for spec in pin.specifier] for pin in pins}
    assert all(str(pin.specifier).startswith("==") and len(pin.specifier) == 1 for pin in pins)
    extras = project["project"]["optional-dependencies"].values()
    for line in [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        (version,) = exact[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{line} does not allow the pinned {version}"


def test_make_commands_in_the_documents_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document, wanted in (("README.md", {"demo", "test"}), ("CONTRIBUTING.md", {"test", "lint"})):
        text = (root / document).read_text(encoding="utf-8")
        told = set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", text, re.MULTILINE)) | set(
            re.findall(r"`make ([a-z-]+)`", text)
        )
        assert wanted <= told <= targets, f"{document} tells {told}, the Makefile has {targets}"


class TestGuard:
    """The sentence that conftest.py ends a run with where the installed package is not this checkout."""

    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        for name in ("compiler/__init__.py", "compiler/glyphs/world.py", "passes/uce.py", "targets/hf.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    @pytest.fixture
    def installed(self, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("installed") / "erasec"
        links = {"__init__.py": "compiler", "glyphs/world.py": "compiler", "passes/uce.py": "", "targets/hf.py": ""}
        for name, inside in links.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(checkout / inside / name)
        return folder

    def test_the_same_files_are_fine(self, guard: Callable[..., str], checkout: Path, installed: Path) -> None:
        assert guard(checkout, installed) == ""

    def test_linked_folders_are_fine(self, guard: Callable[..., str], checkout: Path, tmp_path: Path) -> None:
        folder = tmp_path / "tree" / "erasec"
        folder.mkdir(parents=True)
        for name in ("compiler/__init__.py", "compiler/glyphs", "passes", "targets"):
            (folder / Path(name).name).symlink_to(checkout / name)
        assert guard(checkout, folder) == ""

    def test_a_new_file(self, guard: Callable[..., str], checkout: Path, installed: Path) -> None:
        (checkout / "passes" / "rece.py").touch()
        sentence = guard(checkout, installed)
        assert "passes/rece.py is not in it: run pip install -e . again" in sentence

    def test_a_removed_file(self, guard: Callable[..., str], checkout: Path, installed: Path) -> None:
        (checkout / "compiler" / "glyphs" / "world.py").unlink()
        assert "glyphs/world.py is in it no more" in guard(checkout, installed)

    def test_a_copy(self, guard: Callable[..., str], checkout: Path, installed: Path) -> None:
        (installed / "targets" / "hf.py").unlink()
        (installed / "targets" / "hf.py").touch()
        assert "targets/hf.py in it is another file" in guard(checkout, installed)

    def test_files_that_are_not_shipped_do_not_matter(
        self, guard: Callable[..., str], checkout: Path, installed: Path
    ) -> None:
        (checkout / "passes" / "notes.md").touch()
        assert guard(checkout, installed) == ""


def test_public_names_are_there_and_lazy() -> None:
    for name in erasec.__all__:
        assert getattr(erasec, name).__name__ == name
    with pytest.raises(AttributeError, match="Modle"):
        _ = erasec.Modle
    code = "import sys, erasec; sys.exit(any(name.startswith('erasec.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
