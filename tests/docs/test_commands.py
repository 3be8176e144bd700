"""Every command in the documents is one that erasec takes: its arguments, its options, and the options of passes,
targets, judges and probes. Recipes in the documents can be read."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.exceptions import TyperException
from typer.main import get_command

from erasec import registry
from erasec.cli.app import app
from erasec.commands.audit import parse_limits
from erasec.errors import ErasecError
from erasec.options import configure
from erasec.recipe.recipe import from_toml, parse_named_options

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
# A line that shows how a command is called, with names for its values, is no command. Other tests hold these to the
# program: test_readme.py, and test_generated.py for docs/cli.md.
SYNOPSIS = ("MODEL|RECIPE", "[OPTIONS]")


def commands(text: str) -> Iterator[str]:
    """The commands of a page, in code blocks with and without fences; without the remarks behind them."""
    blocks = [body for kind, body in BLOCK.findall(text) if kind in ("", "sh")]
    blocks += re.findall(r"^    \S.*$", BLOCK.sub("", text), re.MULTILINE)
    for block in blocks:
        if not any(mark in block for mark in SYNOPSIS):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                yield re.split(r"\s{3,}", line.strip())[0]


def parse(line: str) -> dict[str, Any]:
    """The arguments of a line ``erasec COMMAND ...``. Raises an exception where erasec would refuse them."""
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    values: dict[str, Any] = COMMANDS[words[0]].make_context(words[0], words[1:]).params
    for key, load in (("passes", registry.load_pass), ("target", registry.load_target), ("probe", registry.load_probe)):
        for text in values.get(key) or ():
            use = parse_named_options(text)
            configure(load(use.name), use.options, use.name)  # type: ignore[operator]
    for text in values.get("judge") or ():
        use = parse_named_options(text, "--judge")
        kind = registry.load_judge(use.name)
        if kind.settings:
            configure(kind.settings, use.options, use.name)
    if words[0] == "audit":
        parse_limits(values["limit"] or ())
    return values


@pytest.fixture(autouse=True)
def in_the_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands name files such as examples/my_pass.py."""
    monkeypatch.chdir(root)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_of_the_program(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        if line.startswith("erasec "):
            parse(line)
        elif line.startswith("python "):
            check_script(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_sentence_has_its_options(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`((?:erasec|python) [^`]+)`", text):
        words = span.split()
        if words[0] == "python":
            check_script(span)
        elif words[1].islower() and words[1].isalpha():
            command = COMMANDS[words[1]]
            known = {option for parameter in command.params for option in (*parameter.opts, "--help")}
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, span


def check_script(line: str) -> None:
    """Raise AssertionError unless the file of ``python FILE.py --option`` is there and knows the options."""
    words = shlex.split(line, comments=True)
    if words[1] == "-m" and not words[2].startswith("erasec."):
        return
    if words[1] == "-m":
        file = ROOT / "compiler" / f"{words[2].removeprefix('erasec.').replace('.', '/')}.py"
    else:
        file = ROOT / words[1]
    assert file.is_file(), line
    source = file.read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{line}: {option}"


def test_the_commands_of_the_pages_are_seen() -> None:
    lines = [
        line for page in PAGES for line in commands(page.read_text(encoding="utf-8")) if line.startswith("erasec ")
    ]
    assert len(lines) > 70
    assert {line.split()[1] for line in lines} >= {
        "build",
        "plan",
        "run",
        "check",
        "verify",
        "audit",
        "explain",
        "matrix",
    }
    text = "```\nerasec plan a \\\n  --erase b     what it does\n```\n\n    erasec list passes\n"
    assert list(commands(text)) == ["erasec plan a --erase b", "erasec list passes"]


@pytest.mark.parametrize(
    "line",
    [
        "erasec biuld glyphs",
        "erasec build",
        "erasec build glyphs --earse star",
        "erasec build glyphs --pass uce:kep=2",
        "erasec build glyphs --pass uce:rows=first",
        "erasec build glyphs --target trt:refit=maybe",
        "erasec run a --prompt b --out c.png --steps 0",
        "erasec audit a --limit inversion",
    ],
)
def test_a_command_that_is_wrong_is_noticed(line: str) -> None:
    with pytest.raises((KeyError, ErasecError, TyperException)):
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_toml_block_can_be_read(page: Path) -> None:
    for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "toml":
            content = tomllib.loads(body)
            if "erasec" in content:
                from_toml(body)
