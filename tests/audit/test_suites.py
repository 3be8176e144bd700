"""The suites: what they name exists, each holds the one before, and the longest leaves no probe out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from erasec import audit
from erasec.audit.suites import SUITES, find_suite, make_probes
from erasec.errors import ErasecError
from erasec.registry import PROBES


@pytest.mark.parametrize("name", SUITES)
def test_every_probe_of_a_suite_can_be_made(name: str) -> None:
    suite = find_suite(name)
    probes = make_probes(suite.probes)
    assert [probe.name for probe in probes] == [text.partition(":")[0] for text in suite.probes]
    assert len(set(suite.probes)) == len(suite.probes)


def test_longer_suites_have_the_probes_of_shorter_ones_and_the_longest_has_all() -> None:
    names = [{text.partition(":")[0] for text in suite.probes} for suite in SUITES.values()]
    assert names[0] < names[1] < names[2] == PROBES.keys()
    assert [suite.images for suite in SUITES.values()] == sorted(suite.images for suite in SUITES.values())


def test_an_unknown_suite_and_an_unknown_option_are_errors() -> None:
    with pytest.raises(ErasecError, match="no suite 'standart'") as caught:
        find_suite("standart")
    assert "standard" in caught.value.why
    with pytest.raises(ErasecError, match="undo"):
        make_probes(["undo:cuts=0.1"])


def without_fix(source: str) -> list[str]:
    """The errors that a module raises without saying what to do."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    raised = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "ErasecError"]
    return [ast.unparse(call) for call in raised if not any(word.arg == "fix" for word in call.keywords)]


def test_every_obstacle_says_what_can_be_done_about_it() -> None:
    """The page shows why a probe was not run, to people who did not write it."""
    modules = sorted(Path(audit.__path__[0]).glob("*.py"))
    assert len(modules) > 20
    assert {module.name: errors for module in modules if (errors := without_fix(module.read_text()))} == {}
    assert without_fix("raise ErasecError('no', why='so')") == ["ErasecError('no', why='so')"]
