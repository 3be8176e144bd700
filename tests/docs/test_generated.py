"""The parts of the documents that come from the code are those of the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from erasec import registry
from erasec.options import options


@pytest.fixture(scope="module")
def generate(root: Path) -> ModuleType:
    """The script docs/generate.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", root / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generate"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(generate: ModuleType, root: Path) -> None:
    names = [str(page.relative_to(root)) for page in generate.outdated()]
    assert not names, f"{', '.join(names)} differ from the code: run   python docs/generate.py   and commit the result"


def test_every_pass_and_target_has_its_parts(generate: ModuleType, root: Path) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in (root / "docs").rglob("*.md")}
    parts = [(name, page) for page, text in pages.items() for _, name, _ in generate.PART.findall(text)]
    assert len(parts) == len({name for name, _ in parts}), "a part stands in two places"
    of_passes = {f"{part} {name}" for name in registry.PASSES for part in ("facts", "figures", "pass")}
    wanted = of_passes | {f"target {name}" for name in registry.TARGETS} | set(generate.PARTS)
    assert {name for name, _ in parts} == wanted
    for name, page in parts:
        if name in of_passes:
            assert page == root / "docs/passes" / f"{name.partition(' ')[2]}.md"


def test_a_change_of_the_code_or_of_a_page_is_noticed(
    generate: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "uce.md"
    text = (root / "docs/passes/uce.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    assert generate.outdated(tmp_path) == {}
    page.write_text(text.replace("| `0.001` |", "| `0.002` |"), encoding="utf-8")
    assert generate.outdated(tmp_path) == {page: text}
    page.write_text(text, encoding="utf-8")
    monkeypatch.setattr(registry.load_pass("uce"), "summary", "something else")
    assert "* **What:** something else." in generate.outdated(tmp_path)[page]


def test_a_part_that_does_not_exist_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(LookupError, match="no part 'pass nothing'"):
        generate.part("pass nothing")


class Base:
    """What all have. ``rank`` is the rank; ``lr`` and ``steps`` are the rate and the number of steps."""


@options
class Mine(Base):
    """Erases (see ``Base``).

    ``mode`` is how: "fast" takes seconds. "exact" takes hours. Then comes something else. ``mode`` is used later, too.
    """

    mode: Literal["fast", "exact"] = "fast"
    rank: Annotated[int, Field(ge=1, lt=2**31)] = 4
    lr: float = 1e-5
    steps: int = 10
    name: ClassVar[str] = "mine"


def test_the_meaning_of_an_option_is_what_the_docstring_says(generate: ModuleType) -> None:
    rows = generate.option_table(Mine).splitlines()[2:]
    assert rows == [
        "| `mode` | `fast`, `exact` | `fast` | `mode` is how: `fast` takes seconds. `exact` takes hours. |",
        "| `rank` | a whole number, at least 1, below 2147483648 | `4` | `rank` is the rank. |",
        "| `lr` | a number | `1e-05` | `lr` and `steps` are the rate and the number of steps. |",
        "| `steps` | a whole number | `10` | see `lr` |",
    ]
    undocumented = dataclasses.make_dataclass("Undocumented", [("depth", int, 1)], bases=(Base,))
    with pytest.raises(LookupError, match="docstring of Undocumented does not say what ``depth`` is"):
        generate.option_table(undocumented)
