"""Estimates of memory, disk and time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from erasec.commands.plan import describe, make_plan
from erasec.errors import ErasecError
from erasec.graphs.cache import GRAPHS_BYTES
from erasec.model import operations
from erasec.recipe.recipe import Limits, NamedOptions, Recipe, from_flags
from erasec.training.base import Measures

EARLIER = {"schema": "erasec.report/1", "written": [{"path": "hf", "files": {}}]}


def recipe(model: Path, **changed: Any) -> Recipe:
    return from_flags(str(model), erase=["star"], device="cpu").model_copy(update=changed)


def test_estimates_come_from_the_files(here: Path, random_folder: Path) -> None:
    described = describe(make_plan(recipe(random_folder, targets=("hf", "onnx")), pin=False))
    copied = sum(path.stat().st_size for path in random_folder.rglob("*") if path.is_file())
    hf, onnx = (target["bytes"] for target in described["targets"])
    assert hf == copied
    assert 1.9 < onnx / hf < 2.0  # float16 becomes float32
    # The graphs are written to TMPDIR, and then to the cache.
    assert sum(disk["needed"] for disk in described["disk"]["disks"]) == hf + onnx + 2 * GRAPHS_BYTES
    assert described["memory"]["bytes"] == max(described["memory"]["steps"].values()) > onnx
    assert "estimate" in described["memory"]["how"]
    assert "estimate" in described["disk"]["how"]


def test_memory_counts_matrices_merged_tensors_pictures_and_training(here: Path, random_folder: Path) -> None:
    described = [
        describe(make_plan(recipe(model), pin=False))["memory"]["steps"] for model in (random_folder, "glyphs")
    ]
    assert set(described[0]) == set(described[1]) == {"solve", "merge", "pictures"}
    unpainted = make_plan(recipe(random_folder, checks=Limits(pictures=0)), pin=False)
    assert set(describe(unpainted)["memory"]["steps"]) == {"solve", "merge"}
    resolved = make_plan(recipe(random_folder), pin=False)
    counts = {
        name: sum(math.prod(entry.shape) for entry in resolved.model.entries(name).values())
        for name in ("text_encoder", "unet")
    }
    text = 4 * counts["text_encoder"]
    assert described[0]["solve"] == text + 5 * 8 * 128**2
    assert described[0]["merge"] == 8 * max(math.prod(site.shape) for site in resolved.model.select("cross", "kv"))
    learned = make_plan(recipe(random_folder, passes=(NamedOptions(name="esd"),)), pin=False)
    trained = sum(math.prod(site.shape) for site in learned.passes[0].sites(learned.model))
    train = describe(learned)["memory"]["steps"]["train"]
    assert train > text + 4 * (counts["unet"] + 4 * trained)  # and activations and libraries
    wider = make_plan(recipe(random_folder, passes=(NamedOptions(name="esd", options={"batch": 8}),)), pin=False)
    rows = 8 - learned.passes[0].batch  # the default has no loss on kept prompts
    saved = 4 * rows * operations.denoiser(resolved.model).saved
    assert describe(wider)["memory"]["steps"]["train"] == pytest.approx(train + saved)


def test_time_is_that_of_an_earlier_build(here: Path, random_folder: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "report.json").write_text(json.dumps({**EARLIER, "seconds": {"solve": 1.5, "report": 2.0}}))
    time = describe(make_plan(recipe(random_folder), Path("out"), pin=False))["time"]
    assert time["seconds"] == 3.5
    assert time["how"] == "measured: the earlier build in out took this long"
    assert describe(make_plan(recipe(random_folder), Path("other"), pin=False))["time"]["seconds"] is None


def test_a_memory_that_is_too_small_for_a_training_is_an_error(here: Path) -> None:
    small = {"passes": (NamedOptions(name="esd"),), "memory": "10MB"}
    with pytest.raises(ErasecError, match="esd does not fit 10 MB"):
        make_plan(recipe(Path("glyphs"), **small), pin=False)
    large = make_plan(recipe(Path("glyphs"), **{**small, "memory": "100GB"}), pin=False)
    assert large.measures == (Measures(),)
    assert describe(large)["memory"]["limit"] == 100 * 10**9
    # A pass that trains nothing needs no measures, and without a limit there are none.
    assert make_plan(recipe(Path("glyphs"), memory="10MB", passes=(NamedOptions(name="uce"),)), pin=False).measures == (
        None,
    )
    assert make_plan(recipe(Path("glyphs"), passes=(NamedOptions(name="esd"),)), pin=False).measures == (None,)
