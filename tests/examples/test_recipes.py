"""Every example recipe: what it names is there, and its passes take their options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from erasec import registry
from erasec.base import with_options
from erasec.errors import ErasecError
from erasec.model.view import BUNDLED, HUB
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

# What the papers or their code print, where a recipe takes it; what it takes otherwise, it says.
PUBLISHED: dict[str, dict[str, object]] = {
    "esd": {"train": "x", "steps": 1000, "lr": 1e-5, "batch": 1, "negative": 1.0, "guidance": 3.0, "path": 50,
            "keep": 0.0},
    "kpop": {"train": "x", "mode": "mid", "k": 10, "hide": 1.0, "recover": 0.1, "negative": 1.0, "steps": 1000,
             "lr": 1e-5, "batch": 1, "prompt_lr": 1e-5, "prompt_steps": 2, "guidance": 3.0, "path": 50, "keep": 0.0,
             "empty": 0.0, "strange": 0.0, "ema": 0.0},
    "trce": {"lr": 1e-5, "steps": 300, "push": 15.0, "margin": 0.01, "beta": 1.0, "preserve": 100.0, "guidance": 3.0,
             "path": 50, "early": 0.52, "trajectories": 100, "batch": 1, "keep": 0.0},
    "few_shot": {"train": "mlp-final-attn", "lr": 1e-5, "batch": 2, "images": 4, "steps": 10, "keep": 0.0},
    "safegen": {"erase": 0.1, "keep": 0.9, "lr": 1e-5, "steps": 1000, "batch": 5, "target": "constant", "ema": 0.9999},
    "eiup": {"words": "nudity", "until": 0.8, "tokens": "words"},
}  # fmt: skip
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


def others(options: Mapping[str, object], published: Mapping[str, object]) -> list[str]:
    """The published settings that the options do not have."""
    return [name for name, value in published.items() if options.get(name) != value]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_has_the_published_settings(root: Path, name: str) -> None:
    (use,) = recipe.from_file(root / "examples" / f"{name}_sd14.toml").passes
    assert use.name == name
    assert others(use.options, PUBLISHED[name]) == []
    option = next(iter(PUBLISHED[name]))
    assert others({**use.options, option: "another"}, PUBLISHED[name]) == [option]
    # They are no repetition of what a pass does by default, which is tuned to small models.
    assert others(vars(registry.load_pass(name)()), PUBLISHED[name])


def test_every_recipe_of_a_published_method_is_in_the_table() -> None:
    # That of Geom-Erasing was not to be found.
    assert {name.removesuffix("_sd14.toml") for name in NAMES if "_sd14" in name} - {"geom_erasing"} == set(PUBLISHED)


def test_an_option_that_a_pass_has_not_is_told(root: Path) -> None:
    use = recipe.from_file(root / "examples" / "star.toml").passes[0]
    with pytest.raises(ErasecError, match="no option 'tepms'"):
        with_options(registry.load_pass(use.name), {**use.options, "tepms": 1}, use.name)
