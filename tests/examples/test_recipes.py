"""Every example recipe names models, concepts, passes and options that exist, with the published settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec import registry
from erasec.commands import settings
from erasec.errors import ErasecError
from erasec.family import FAMILIES, HUB
from erasec.model.loading import BUNDLED
from erasec.options import configure
from erasec.recipe import concept as concepts
from erasec.recipe import recipe
from erasec.recipe.presets import Presets
from erasec.recipe.recipe import NamedOptions

# The options in which a recipe of a published method differs from the defaults of its pass. The defaults are held to
# the papers by tests/commands/test_settings.py.
OWN: dict[str, dict[str, object]] = {
    "eiup": {"words": "nudity"},
    "esd": {},
    "few_shot": {},
    "geom_erasing": {"boxes": "watermarked"},
    "kpop": {},
    "safegen": {"triplets": "triplets", "target": "constant"},  # as published; the default is corrected
    "trce": {},
}
NAMES = sorted(path.name for path in (Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_names_in_a_recipe_exist(root: Path, name: str) -> None:
    example = recipe.from_file(root / "examples" / name, allow_code=True)
    assert example.model in (*BUNDLED, *HUB)
    own = {concept.name for concept in example.concepts}
    assert {name.partition(":")[0] for name in example.erase} <= concepts.library(example.model).keys() | own
    assert example.passes
    for use in example.passes:
        configure(registry.load_pass(use.name), use.options, use.name)
    for target in example.targets:
        registry.load_target(target)


def own_options(example: recipe.Recipe) -> dict[str, object]:
    """The options that the recipe of a build with one pass sets to another value than its default."""
    erased = [concepts.find(name) for name in example.erase]
    defaults = settings.Defaults(Presets(), settings.family_presets(FAMILIES["sd1"]))
    bare = [NamedOptions(name=use.name) for use in example.passes]
    (given,), (default,) = (settings.settle(uses, erased, defaults) for uses in (example.passes, bare))
    options = settings.options(default.step)
    return {name: value for name, value in settings.options(given.step).items() if value != options[name]}


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_recipe_has_the_published_settings(root: Path, name: str) -> None:
    example = recipe.from_file(root / "examples" / f"{name}_sd14.toml")
    (use,) = example.passes
    assert use.name == name
    assert own_options(example) == OWN[name]
    changed = NamedOptions(name=name, options={**use.options, "steps" if name != "eiup" else "until": 1})
    other = own_options(example.model_copy(update={"passes": (changed,)}))
    assert other.keys() - OWN[name].keys() == {"steps" if name != "eiup" else "until"}


def test_every_recipe_of_a_published_method_is_in_the_table() -> None:
    assert {name.removesuffix("_sd14.toml") for name in NAMES if "_sd14" in name} == set(OWN)


def test_an_unknown_option_is_an_error(root: Path) -> None:
    use = recipe.from_file(root / "examples" / "star.toml").passes[0]
    with pytest.raises(ErasecError, match="no option 'tepms'"):
        configure(registry.load_pass(use.name), {**use.options, "tepms": 1}, use.name)
