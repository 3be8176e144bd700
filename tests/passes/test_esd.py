"""ESD: what is trained, toward what, and that the concept goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model import view as model
from erasec.model.edit import LowRank
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.recipe.concept import Concept
from erasec.training import base as learned
from erasec.training.denoiser import Denoiser

CONCEPT = Concept(name="star", erase=("star",), keep=("square",), templates=("a {}",))


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Model:
    return model.load(str(random_folder))


def test_the_parts_are_those_of_the_paper_and_its_code(base: Model) -> None:
    found = {part: {site.key for site in Esd(train=part).sites(base)} for part in ("x", "u", "noxattn", "full")}
    every = set(base.entries("unet"))
    assert found["x"] == {key for key in every if ".attn2." in key}
    assert found["u"] == every - found["x"]
    heads = {key for key in every if key.split(".")[0] in ("conv_out", "conv_norm_out", "time_embedding")}
    assert len(heads) == 8
    assert found["noxattn"] == found["u"] - heads
    assert found["full"] == every


def distance(base: Model, pass_: Esd) -> tuple[float, float]:
    """How far the student is from the goal of Eq. 8 on trajectories of the concept, before and after."""
    denoiser = Denoiser(base, Context())
    found = learned.bank(denoiser, ["a star"] * 4, 9, 5, 3.0)
    goal = found.free - pass_.negative * (found.said - found.free)
    edited = Denoiser(base.with_edit(pass_.solve(base, CONCEPT, Context())), Context())
    after = learned.asked(edited, ["a star"] * 4, denoiser.sample(["a star"] * 4, learned.seeds(9, 4), 5, 3.0))
    return float((found.said - goal).square().mean()), float((after.said - goal).square().mean())


def test_with_the_prompt_it_learns_what_it_said_away_from_it(base: Model) -> None:
    step = Esd(steps=40, lr=2e-3, batch=8, trajectories=4, path=5, keep=0.0, toward="nothing")
    before, after = distance(base, step)
    assert after < 0.9 * before
    # The control: with eta -1 the goal is what the concept's prompt says anyway.
    edit = Esd(steps=3, lr=1e-2, trajectories=4, path=5, keep=0.0, negative=-1.0, toward="nothing").solve(
        base, CONCEPT, Context()
    )
    assert edit.curves["loss erase"][0] < 1e-9


def test_keep_holds_what_is_said_of_kept_prompts(base: Model) -> None:
    held = learned.bank(Denoiser(base, Context()), ["a square"] * 2, 11, 4, 3.0)

    def moved(keep: float) -> float:
        step = Esd(steps=12, lr=2e-3, batch=4, trajectories=2, path=4, keep=keep)
        edited = base.with_edit(step.solve(base, CONCEPT, Context()))
        now = learned.said(Denoiser(edited, Context()), held)
        return float((now - held.said).square().mean())

    free, kept = moved(0.0), moved(5.0)
    assert 0 < kept < 0.6 * free


def test_toward_the_anchor_the_rest_of_the_prompt_stays(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    concept = CONCEPT.model_copy(update={"anchor": "ring", "templates": ("a red {}",)})
    found = learned.bank(denoiser, ["a red star"] * 2, 3, 4, 3.0)
    other = learned.said(denoiser, replace(found, prompts=("a red ring",) * 2))
    goal = learned.away(denoiser, concept, found, 0.5, "anchor")
    assert torch.allclose(goal, other - 0.5 * (found.said - other), atol=1e-6)
    assert not torch.allclose(goal, learned.away(denoiser, concept, found, 0.5, "nothing"), atol=1e-4)
    with pytest.raises(ErasecError, match="toward is 'anker'"):
        Esd(toward="anker")


def test_a_rank_gives_low_rank_changes_of_the_matrices(base: Model) -> None:
    edit = Esd(steps=2, trajectories=2, path=3, rank=2).solve(base, CONCEPT, Context())
    assert edit.deltas
    assert all(isinstance(delta, LowRank) and delta.rank == 2 for delta in edit.deltas.values())
    assert {site.key for site in edit.deltas} == {s.key for s in Esd().sites(base) if len(s.shape) == 2}
    assert any(float(delta.change(torch.zeros(site.shape)).abs().max()) > 0 for site, delta in edit.deltas.items())


def test_the_work_of_a_build_is_kept_and_read_again(base: Model, tmp_path: Path) -> None:
    step = Esd(steps=2, trajectories=2, path=3)
    one = step.solve(base, CONCEPT, Context(work=tmp_path))
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    assert files[0].name.startswith("esd-")
    two = step.solve(base, CONCEPT, Context(work=tmp_path))
    assert one.stats == two.stats
    assert Esd(steps=3, trajectories=2, path=3).work(base, CONCEPT, Context(work=tmp_path)) != files[0]


def test_an_unknown_part_names_the_near_miss() -> None:
    with pytest.raises(ErasecError, match="train is 'noxatn'") as caught:
        Esd(train="noxatn")
    assert "noxattn" in caught.value.why
