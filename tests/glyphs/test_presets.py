"""Glyphs' presets: a build of glyphs has the options with which the figures of the documents were measured."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from typing import Any, cast

import pytest
from glyph_passes import tuned

from erasec import registry
from erasec.commands import settings
from erasec.commands.settings import Defaults
from erasec.model import loading
from erasec.recipe.concept import Concept
from erasec.recipe.presets import KINDS, Presets
from erasec.recipe.recipe import NamedOptions

STEER: dict[str, object] = {
    "steps": 150,
    "lr": 0.0003,
    "batch": 4,
    "rank": 0,
    "minutes": 0.0,
    "push": 3.0,
    "margin": 0.01,
    "beta": 1.0,
    "early_fraction": 0.75,
    "guidance": 3.0,
    "trajectories": 32,
    "sample_steps": 20,
    "preserve": 5.0,
    "keep": 30.0,
    "reference": False,
}
# The class defaults when they were those of glyphs, in commit 3dd2995, with which docs/learned.md was measured.
TODAY: dict[str, dict[str, object]] = {
    "cure": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
        "rows": "last",
        "hold": 0.0001,
        "strength": 2.0,
        "keep_strength": 2.0,
    },
    "double_projection": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
        "rows": "last",
        "hold": 0.0001,
        "target": "anchor",
    },
    "eiup": {"words": "", "weight": -1.0, "until": 0.8, "tokens": "all"},
    "esd": {
        "steps": 300,
        "lr": 0.0002,
        "batch": 4,
        "rank": 0,
        "minutes": 0.0,
        "train": "x",
        "negative_guidance": 1.0,
        "toward": "anchor",
        "guidance": 3.0,
        "trajectories": 32,
        "sample_steps": 20,
        "min_noise": 0.0,
        "keep": 3.0,
    },
    "few_shot": {
        "steps": 160,
        "lr": 0.0003,
        "batch": 4,
        "rank": 0,
        "minutes": 0.0,
        "train": "mlp-final-attn",
        "folder": "",
        "images": 4,
        "sample_steps": 20,
        "guidance": 4.0,
        "keep": 30.0,
        "stop_ratio": 3.5,
        "min_cosine": 0.98,
        "max_rise": 0.05,
    },
    "geom_erasing": {
        "steps": 500,
        "lr": 0.0005,
        "batch": 8,
        "rank": 0,
        "minutes": 0.0,
        "train": "tokens+x",
        "bins": 3,
        "alpha": 0.3,
        "boxes": "",
        "images": 400,
        "sample_steps": 10,
        "guidance": 1.0,
        "clean": 4.0,
        "keep": 0.0,
    },
    "harden": {
        "steps": 300,
        "lr": 0.0001,
        "batch": 8,
        "rank": 0,
        "minutes": 0.0,
        "train": "image",
        "searches": 8,
        "search_steps": 2,
        "search_lr": 0.02,
        "restart": 25,
        "final_steps": 200,
        "push": 0.25,
        "guidance": 3.0,
        "trajectories": 64,
        "sample_steps": 20,
        "keep": 100.0,
        "recovered": 0.15,
    },
    "kpop": {
        "steps": 250,
        "lr": 0.0005,
        "batch": 4,
        "rank": 0,
        "minutes": 0.0,
        "train": "x",
        "mode": "all",
        "key_rows": 10,
        "init": "random",
        "with_key": "recover",
        "hide": 1.0,
        "recover": 1.0,
        "negative_guidance": 0.0,
        "toward": "anchor",
        "key_lr": 0.01,
        "key_steps": 2,
        "space": "noise",
        "guidance": 3.0,
        "trajectories": 64,
        "sample_steps": 20,
        "keep": 3.0,
        "empty_fraction": 0.25,
        "random_key_fraction": 0.25,
        "ema": 0.95,
    },
    "mace": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
        "own": 1.0,
        "edits": "",
    },
    "project": {
        "scale": 1.0,
        "keep": 0.3,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
        "directions": 2,
        "guide": True,
        "heads": 2,
    },
    "rece": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
        "epochs": 2,
        "derive": 0.1,
    },
    "safegen": {
        "steps": 300,
        "lr": 0.0005,
        "batch": 4,
        "rank": 0,
        "minutes": 0.0,
        "triplets": "",
        "images": 32,
        "sample_steps": 12,
        "guidance": 4.0,
        "mosaic_cells": 2,
        "target": "clipped",
        "max_pull": 6.0,
        "erase": 1.0,
        "keep": 3.0,
        "ema": 0.0,
    },
    "speed": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 1.0,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "v",
        "routes": "all",
        "rows": "last",
        "hold": 0.0001,
    },
    "trce": STEER
    | {"remap_scale": 1.0, "remap_keep": 1.0, "remap_ridge": 0.001, "prior": "", "prior_weight": 1.0}
    | {"routes": "all"},
    "trce.remap": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
    },
    "trce.steer": STEER,
    "uce": {
        "scale": 1.0,
        "keep": 1.0,
        "ridge": 0.001,
        "relative": True,
        "prior": "",
        "prior_weight": 1.0,
        "matrices": "kv",
        "routes": "all",
        "rows": "tail",
        "at": "text",
    },
}

# Passes that have no presets: their defaults are the published ones.
KEPT = ("uce", "mace", "project", "trce.remap", "speed", "double_projection", "cure")


def differing(name: str, defaults: Defaults, kind: str) -> set[str]:
    """The options of a pass that differ from those in ``TODAY``, for a concept of a kind."""
    concept = Concept(name="star", erase=("star",), kind=cast("Any", kind))
    (settled,) = settings.settle([NamedOptions(name=name)], [concept], defaults)
    return {option for option, value in settings.options(settled.step).items() if TODAY[name][option] != value}


@pytest.mark.parametrize("model", ["glyphs", "glyphs-never-star"])
def test_the_options_of_every_pass_and_kind_are_what_they_were(model: str) -> None:
    defaults = settings.defaults_of(loading.load(model))
    assert TODAY.keys() == registry.PASSES.keys()
    for name in TODAY:
        for kind in KINDS:
            assert differing(name, defaults, kind) == set(), (name, kind)


def test_without_the_presets_they_would_not_be() -> None:
    family = settings.defaults_of(loading.load("glyphs")).family
    assert {name for name in TODAY if differing(name, Defaults(Presets(), family), "safety")} == TODAY.keys() - set(
        KEPT
    )


def test_no_preset_repeats_a_default_unless_the_family_sets_the_option() -> None:
    defaults = settings.defaults_of(loading.load("glyphs"))
    by_family = {
        (name, option)
        for name, tables in defaults.family.options.items()
        for table in tables.values()
        for option in table
    }
    for name, tables in defaults.model.options.items():
        default = asdict(cast("Any", registry.load_pass(name)()))
        repeated = {option for option, value in tables[None].items() if default[option] == value}
        assert {(name, option) for option in repeated} <= by_family


def test_the_helper_of_other_tests_creates_the_same_passes() -> None:
    assert {name: asdict(cast("Any", tuned(registry.load_pass(name)))) for name in TODAY} == TODAY
    assert cast("Any", tuned(registry.load_pass("esd"), lr=1.0)).lr == 1.0


@pytest.mark.parametrize("world", ["glyphs", "emoji"])
def test_every_value_that_differs_from_the_published_one_says_so(world: str) -> None:
    name, compared = "", 0
    for line in (loading.bundled_folder(world) / "presets.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = next(iter(tomllib.loads(line)))
            name = ".".join([name, *tomllib.loads(line)[name]])
        elif not line.startswith("#") and line:
            setting, _, comment = line.partition("  # published: ")
            ((option, value),) = tomllib.loads(setting).items()
            published = getattr(registry.load_pass(name), option)
            stated = tomllib.loads(f"value = {comment}")["value"] if comment else value
            assert stated == published, f"{world} [{name}] {option}"
            assert bool(comment) == (value != published), f"{world} [{name}] {option}"
            compared += 1
    assert compared > 50
