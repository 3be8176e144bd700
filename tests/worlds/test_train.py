"""The trainer: an interrupted run ends where an uninterrupted one does, and the tokenizer is CLIP's kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasec.glyphs.world import sample
from erasec.model.loading import bundled_folder
from erasec.recipe.presets import read_presets
from erasec.worlds import assemble, fit, train
from erasec.worlds.base import open_world
from erasec.worlds.work import Work


class Stopped(Exception):
    pass


def run(folder: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    average = fit.Average(module, 0.9)
    optimizer = torch.optim.AdamW(module.parameters())

    def loss(step: int, rng: torch.Generator) -> Tensor:
        if step == stop_at:
            raise Stopped
        return (module(torch.randn(4, 3, generator=rng)) - 1).pow(2).mean()

    fit.fit(folder, 12, 0.05, optimizer, {"module": module, "average": average}, loss, 7, after=average.update)
    return {**module.state_dict(), **{f"average.{key}": value for key, value in average.state_dict().items()}}


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SAVE_EVERY_S", 0.0)
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_at=5)
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not torch.equal(whole["weight"], whole["average.weight"])
    fresh = torch.nn.Linear(3, 2)
    assert not torch.equal(whole["weight"], fresh.weight)


def test_a_world_gets_its_own_presets_also_where_they_are_written_over(tmp_path: Path) -> None:
    before = read_presets(bundled_folder("glyphs"))
    assert before.options
    assemble.write_presets(tmp_path, "glyphs")
    assert read_presets(tmp_path).options == before.options
    assemble.write_presets(bundled_folder("glyphs"), "glyphs")
    assert read_presets(bundled_folder("glyphs")) == before


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(SystemExit, match="lower the learning rate"):
        fit.fit(
            tmp_path / "x", 3, 1e-3, optimizer, {"m": module}, lambda step, rng: module.weight.sum() * float("nan"), 0
        )


def test_learning_rate_warms_up_and_comes_down() -> None:
    rates = [fit.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == 0.2
    assert max(rates) == 1.0 == rates[5]
    assert rates[-1] < 0.02


def test_the_tokenizer_is_clips_kind(tmp_path: Path) -> None:
    assemble.write_tokenizer(tmp_path, [sample(0, index).caption for index in range(400)], 1000)
    tokens = assemble.tokenizer(tmp_path)
    ids = tokens(["a star", "naïve 漢字!"], padding="max_length", max_length=77, truncation=True).input_ids
    assert all(len(row) == 77 and row[0] == tokens.bos_token_id and row[-1] == tokens.eos_token_id for row in ids)
    assert tokens.pad_token_id == tokens.eos_token_id == len(tokens) - 1
    assert tokens.convert_ids_to_tokens(ids[0][1:3]) == ["a</w>", "star</w>"]
    assert tokens.decode(ids[1], skip_special_tokens=True).replace(" ", "") == "naïve漢字!"


def test_the_text_stage_trains_on_captions_that_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every caption has the words of the same rows, drawn from the step: with the words of others the loss differs."""

    def losses(reword: Any) -> list[float]:
        world = replace(open_world("glyphs", None), reword=reword)
        work = Work(world, tmp_path, "cpu", scale=0.001)
        found: list[float] = []

        def first(folder: Path, steps: int, peak: float, optimizer: Any, parts: Any, loss: Any, seed: int) -> None:
            rngs = [torch.Generator().manual_seed(step) for step in (0, 0, 1)]
            found.extend(float(loss(step, rng).detach()) for step, rng in zip((0, 0, 1), rngs, strict=True))

        monkeypatch.setattr(train, "fit", first)
        torch.manual_seed(0)
        train.stage_text(work)
        return found

    train.run_stage(Work(open_world("glyphs", None), tmp_path, "cpu", scale=0.001), "render")
    plain, same, other = losses(None), losses(lambda rng, text: text), losses(lambda rng, text: text[::-1])
    assert plain == same
    assert plain != other
    drawn = losses(lambda rng, text: f"{text} {rng.integers(1000)}")
    assert drawn[0] == drawn[1]  # a step always draws the same words


@pytest.mark.slow
def test_the_whole_recipe_runs_at_a_thousandth(tmp_path: Path) -> None:
    train.main(["glyphs", "--work", str(tmp_path), "--scale", "0.001", "--device", "cpu"])
    for name in ("glyphs", "glyphs-never-star", "judges"):
        assert list((tmp_path / "weights" / name).rglob("*.safetensors"))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("resume.pt")}
    train.main(["glyphs", "--work", str(tmp_path), "--scale", "0.001", "--device", "cpu"])
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("resume.pt")}
