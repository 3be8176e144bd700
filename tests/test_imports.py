"""The import contracts of pyproject.toml hold, and a forbidden import breaks the contract that forbids it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ORDER = "A room imports only from rooms below its own"
REGISTRY = "Nobody imports a pass, a target or a judge of concepts: the registry names them as strings"
TARGETS = "Targets never learn that anything was erased; edit and lora write just that"


def broken(root: Path) -> set[str]:
    """The names of the contracts that the package below ``root``/src breaks."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--config", str(root / "pyproject.toml"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    contracts = re.findall(r"^(.+) BROKEN\b", done.stdout, re.MULTILINE)
    assert (done.returncode != 0) is bool(contracts), done.stdout + done.stderr
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return set(contracts)


@pytest.fixture(scope="module")
def copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of the checkout without their data, and pyproject.toml."""
    folder = tmp_path_factory.mktemp("copy")
    only_code = shutil.ignore_patterns("weights", "concepts", "clip", "templates", "__pycache__")
    for name in ("compiler", "passes", "targets", "src"):
        shutil.copytree(root / name, folder / name, symlinks=True, ignore=only_code)
    shutil.copy(root / "pyproject.toml", folder)
    return folder


def test_every_contract_holds(copy: Path) -> None:
    assert broken(copy) == set()


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("compiler/ldm/configs.py", "from erasec.commands import plan", ORDER),
        ("compiler/base.py", "from erasec.model.view import Model", ORDER),
        ("compiler/commands/plan.py", "from erasec.passes.uce import Uce", REGISTRY),
        ("compiler/commands/plan.py", "from erasec.judges.nudenet import NudeNet", REGISTRY),
        ("targets/hf.py", "from erasec.recipe.concept import Concept", TARGETS),
        ("targets/ov.py", "from erasec.model.edit import Edit", TARGETS),
    ],
)
def test_a_forbidden_import_breaks_its_contract(copy: Path, file: str, line: str, contract: str) -> None:
    path = copy / file
    before = path.read_text(encoding="utf-8")
    path.write_text(before + f"\n\n{line}\n", encoding="utf-8")
    try:
        assert contract in broken(copy)
    finally:
        path.write_text(before, encoding="utf-8")


def test_a_room_that_no_contract_orders_is_noticed(copy: Path) -> None:
    room = copy / "compiler" / "attic"
    room.mkdir()
    (room / "__init__.py").touch()
    try:
        assert ORDER in broken(copy)
    finally:
        shutil.rmtree(room)


def test_the_targets_contract_names_its_exceptions(root: Path) -> None:
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["name"] == TARGETS)
    assert contract["source_modules"] == ["erasec.targets.*"]
    assert {each.split(" -> ")[0] for each in contract["ignore_imports"]} == {
        "erasec.targets.edit_file",
        "erasec.targets.lora",
    }
