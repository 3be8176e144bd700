"""Every example recipe: what it names is there, and its passes take their options."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec import concept as concepts
from erasec import recipe, registry
from erasec.base import with_options
from erasec.errors import ErasecError
from erasec.model import BUNDLED, HUB

NAMES = sorted(path.name for path in (Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_what_there_is(root: Path, name: str) -> None:
    found = recipe.from_file(root / "examples" / name)
    assert found.model in (*BUNDLED, *HUB)
    own = {each.name for each in found.concepts}
    assert {name.partition(":")[0] for name in found.erase} <= concepts.library().keys() | own
    assert found.passes
    for use in found.passes:
        with_options(registry.load_pass(use.name), use.options, use.name)
    for target in found.targets:
        registry.load_target(target)


def test_an_option_that_a_pass_has_not_is_told(root: Path) -> None:
    use = recipe.from_file(root / "examples" / "star.toml").passes[0]
    with pytest.raises(ErasecError, match="no option 'tepms'"):
        with_options(registry.load_pass(use.name), {**use.options, "tepms": 1}, use.name)
