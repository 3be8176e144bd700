from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from importlib import resources
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import erasec

FOLDERS = ("compiler", "passes", "targets")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(root: Path) -> list[Requirement]:
    return [Requirement(line) for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines()]


def test_no_generic_name_is_installed(root: Path) -> None:
    # pytest puts the folder of tests on the path; an installed package does not.
    path = [folder for folder in sys.path if Path(folder or ".").resolve() not in (root, root / "tests")]
    assert PathFinder.find_spec("erasec", path) is not None
    for name in ("compiler", "passes", "targets", "tests", "examples"):
        assert PathFinder.find_spec(name, path) is None, f"import {name} works, and should not"


def test_every_folder_of_modules_is_a_package(root: Path, project: dict[str, Any]) -> None:
    find = project["tool"]["setuptools"]["packages"]["find"]
    names = set(find_packages(str(root / find["where"][0]), include=find["include"]))
    folders = {file.parent.relative_to(root) for place in FOLDERS for file in (root / place).rglob("*.py")}
    wanted = {".".join(("erasec", *folder.parts)).replace("erasec.compiler", "erasec") for folder in folders}
    assert names == wanted
    assert {"erasec", "erasec.passes", "erasec.targets", "erasec.glyphs"} < names


def test_the_source_tree_is_importable_without_an_install(root: Path) -> None:
    """Type checkers and editors follow the links, so that they see a new file immediately."""
    for link, folder in (("src/erasec", "compiler"), ("compiler/passes", "passes"), ("compiler/targets", "targets")):
        assert (root / link).is_symlink() and (root / link).resolve() == root / folder
    code = "import erasec.passes.uce, erasec.targets.hf, erasec.glyphs.world; print(erasec.__file__)"
    installed = [path for path in sys.path if Path(path) != root / "src"]
    environment = {"PYTHONPATH": os.pathsep.join((str(root / "src"), *installed))}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == str(root / "src/erasec/__init__.py")


def test_package_data_is_found(root: Path, project: dict[str, Any]) -> None:
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        installed = Path(str(resources.files(package)))
        folder = root / "compiler" / Path(*package.split(".")[1:])
        assert installed.resolve() == folder
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: no file matches {pattern}"


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
        commands = set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", text, re.MULTILINE)) | set(
            re.findall(r"`make ([a-z-]+)`", text)
        )
        assert wanted <= commands <= targets, f"{document} names {commands}, the Makefile has {targets}"


def test_public_names_are_there_and_lazy() -> None:
    for name in erasec.__all__:
        assert getattr(erasec, name).__name__ == name
    with pytest.raises(AttributeError, match="Modle"):
        _ = erasec.Modle
    code = "import sys, erasec; sys.exit(any(name.startswith('erasec.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
