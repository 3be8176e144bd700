"""ESD: what is trained, its targets, and that the predictions approach them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from glyph_passes import tuned

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.edit import LowRank
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.recipe.concept import Concept
from erasec.training import banks
from erasec.training.base import TrainingContext
from erasec.training.denoiser import Denoiser

CONCEPT = Concept(name="star", erase=("star",), keep=("square",), templates=("a {}",))


def test_the_trained_tensors_are_those_of_the_paper_and_its_code(base: Model) -> None:
    trained = {
        part: {site.key for site in tuned(Esd, train=part).sites(base)} for part in ("x", "u", "noxattn", "full")
    }
    every = set(base.entries("unet"))
    assert trained["x"] == {key for key in every if ".attn2." in key}
    assert trained["u"] == every - trained["x"]
    heads = {key for key in every if key.split(".")[0] in ("conv_out", "conv_norm_out", "time_embedding")}
    assert len(heads) == 8
    assert trained["noxattn"] == trained["u"] - heads
    assert trained["full"] == every


def distance(base: Model, pass_: Esd) -> tuple[float, float]:
    """Mean squared distance of the predictions from the target of Eq. 8 on trajectories, before and after."""
    denoiser = Denoiser(base, Context())
    bank = banks.sample_bank(denoiser, ["a star"] * 4, 9, 5, 3.0)
    target = bank.unconditional - pass_.negative_guidance * (bank.predictions - bank.unconditional)
    edited = Denoiser(base.with_edit(pass_.solve(base, CONCEPT, Context())), Context())
    after = banks.score_trajectories(
        edited, ["a star"] * 4, denoiser.sample(["a star"] * 4, banks.training_seeds(9, 4), 5, 3.0)
    )
    return float((bank.predictions - target).square().mean()), float((after.predictions - target).square().mean())


def test_it_learns_the_target_of_the_paper(base: Model) -> None:
    step = tuned(Esd, steps=40, lr=2e-3, batch=8, trajectories=4, sample_steps=5, keep=0.0, toward="nothing")
    before, after = distance(base, step)
    assert after < 0.9 * before
    # The control: with eta -1 the target is the prediction for the concept's prompt itself.
    edit = tuned(
        Esd, steps=3, lr=1e-2, trajectories=4, sample_steps=5, keep=0.0, negative_guidance=-1.0, toward="nothing"
    ).solve(base, CONCEPT, Context())
    assert edit.curves["loss erase"][0] < 1e-9


def test_keep_preserves_the_predictions_for_kept_prompts(base: Model) -> None:
    bank = banks.sample_bank(Denoiser(base, Context()), ["a square"] * 2, 11, 4, 3.0)

    def change(keep: float) -> float:
        step = tuned(Esd, steps=12, lr=2e-3, batch=4, trajectories=2, sample_steps=4, keep=keep)
        edited = base.with_edit(step.solve(base, CONCEPT, Context()))
        after = banks.predict_bank(Denoiser(edited, Context()), bank)
        return float((after - bank.predictions).square().mean())

    without, preserved = change(0.0), change(5.0)
    assert 0 < preserved < 0.6 * without


def test_toward_the_anchor_the_rest_of_the_prompt_stays(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    concept = CONCEPT.model_copy(update={"anchor": "ring", "templates": ("a red {}",)})
    bank = banks.sample_bank(denoiser, ["a red star"] * 2, 3, 4, 3.0)
    anchor = banks.predict_bank(denoiser, replace(bank, prompts=("a red ring",) * 2))
    target = banks.esd_target(denoiser, concept, bank, 0.5, "anchor")
    assert torch.allclose(target, anchor - 0.5 * (bank.predictions - anchor), atol=1e-6)
    assert not torch.allclose(target, banks.esd_target(denoiser, concept, bank, 0.5, "nothing"), atol=1e-4)
    with pytest.raises(ErasecError, match="toward is 'anker'"):
        tuned(Esd, toward="anker")  # type: ignore[arg-type]


def test_a_rank_gives_low_rank_changes_of_the_matrices(base: Model) -> None:
    edit = tuned(Esd, steps=2, trajectories=2, sample_steps=3, rank=2).solve(base, CONCEPT, Context())
    assert edit.deltas
    assert all(isinstance(delta, LowRank) and delta.rank == 2 for delta in edit.deltas.values())
    assert {site.key for site in edit.deltas} == {s.key for s in tuned(Esd).sites(base) if len(s.shape) == 2}
    assert any(float(delta.change(torch.zeros(site.shape)).abs().max()) > 0 for site, delta in edit.deltas.items())


def test_a_finished_training_is_saved_and_read_again(base: Model, tmp_path: Path) -> None:
    step = tuned(Esd, steps=2, trajectories=2, sample_steps=3)
    context = TrainingContext(resume_folder=tmp_path)
    one = step.solve(base, CONCEPT, context)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    assert files[0].name.startswith("esd-")
    two = step.solve(base, CONCEPT, context)
    assert one.stats == two.stats
    assert tuned(Esd, steps=3, trajectories=2, sample_steps=3).resume_file(base, CONCEPT, context) != files[0]


def test_an_unknown_choice_suggests_the_nearest() -> None:
    with pytest.raises(ErasecError, match="train is 'noxatn'") as caught:
        tuned(Esd, train="noxatn")  # type: ignore[arg-type]
    assert "noxattn" in caught.value.why
