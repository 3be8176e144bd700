"""Every example recipe names models, concepts, passes and options that exist, with the published settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from erasec import registry
from erasec.errors import ErasecError
from erasec.family import HUB
from erasec.model.loading import BUNDLED
from erasec.options import configure
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

# The settings of the papers or their code that a recipe uses. The recipe itself comments on other settings.
PUBLISHED: dict[str, dict[str, object]] = {
    "esd": {
        "train": "x",
        "steps": 1000,
        "lr": 1e-5,
        "batch": 1,
        "negative_guidance": 1.0,
        "guidance": 3.0,
        "sample_steps": 50,
        "keep": 0.0,
    },
    "kpop": {
        "train": "x",
        "mode": "mid",
        "key_rows": 10,
        "hide": 1.0,
        "recover": 0.1,
        "negative_guidance": 1.0,
        "steps": 1000,
        "lr": 1e-5,
        "batch": 1,
        "key_lr": 1e-5,
        "key_steps": 2,
        "guidance": 3.0,
        "sample_steps": 50,
        "keep": 0.0,
        "empty_fraction": 0.0,
        "random_key_fraction": 0.0,
        "ema": 0.0,
    },
    "trce": {
        "lr": 1e-5,
        "steps": 300,
        "push": 15.0,
        "margin": 0.01,
        "beta": 1.0,
        "preserve": 100.0,
        "guidance": 3.0,
        "sample_steps": 50,
        "early_fraction": 0.52,
        "trajectories": 100,
        "batch": 1,
        "keep": 0.0,
    },
    "few_shot": {"train": "mlp-final-attn", "lr": 1e-5, "batch": 2, "images": 4, "steps": 10, "keep": 0.0},
    "safegen": {"erase": 0.1, "keep": 0.9, "lr": 1e-5, "steps": 1000, "batch": 5, "target": "constant", "ema": 0.9999},
    "eiup": {"words": "nudity", "until": 0.8, "tokens": "words"},
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


def differing(options: Mapping[str, object], published: Mapping[str, object]) -> list[str]:
    """The names of the published settings that differ from the options."""
    return [name for name, value in published.items() if options.get(name) != value]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_has_the_published_settings(root: Path, name: str) -> None:
    (use,) = recipe.from_file(root / "examples" / f"{name}_sd14.toml").passes
    assert use.name == name
    assert differing(use.options, PUBLISHED[name]) == []
    option = next(iter(PUBLISHED[name]))
    assert differing({**use.options, option: "another"}, PUBLISHED[name]) == [option]
    # They differ from the defaults of the pass, which are for small models.
    assert differing(vars(registry.load_pass(name)()), PUBLISHED[name])


def test_every_recipe_of_a_published_method_is_in_the_table() -> None:
    # The settings of Geom-Erasing are not published.
    assert {name.removesuffix("_sd14.toml") for name in NAMES if "_sd14" in name} - {"geom_erasing"} == set(PUBLISHED)


def test_an_unknown_option_is_an_error(root: Path) -> None:
    use = recipe.from_file(root / "examples" / "star.toml").passes[0]
    with pytest.raises(ErasecError, match="no option 'tepms'"):
        configure(registry.load_pass(use.name), {**use.options, "tepms": 1}, use.name)
