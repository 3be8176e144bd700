"""Banks: rows with the teacher's predictions, prompts and seeds for them, and the preservation loss."""

from __future__ import annotations

import torch

from erasec.base import Context
from erasec.glyphs.judge import GlyphJudge
from erasec.model.view import Model
from erasec.recipe import concept as concepts
from erasec.training import banks
from erasec.training.base import networks
from erasec.training.denoiser import Denoiser
from erasec.training.student import Student


def test_a_bank_holds_the_teacher_s_predictions_for_each_latent_with_its_prompt(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    prompts, part = ["a star", "a ring", ""], slice(0, 2)
    bank = banks.sample_bank(denoiser, prompts, seed=2, sample_steps=4, guidance=3.0, part=part)
    assert bank.latents.shape[0] == bank.predictions.shape[0] == bank.timesteps.shape[0] == 6
    assert bank.texts(torch.tensor([0, 2, 5])) == ["a star", "a ring", ""]
    row = 3
    with torch.no_grad():
        prompted = denoiser.predict(bank.latents[[row]], bank.timesteps[[row]], denoiser.states(["a ring"]))
        unconditional = denoiser.predict(bank.latents[[row]], bank.timesteps[[row]], denoiser.states([""]))
    assert torch.allclose(bank.predictions[[row]], prompted, atol=1e-5)
    assert torch.allclose(bank.unconditional[[row]], unconditional, atol=1e-5)
    assert not torch.allclose(prompted, unconditional, atol=1e-5)
    again = banks.sample_bank(Denoiser(base, Context()), prompts, 2, 4, 3.0, part)
    assert torch.equal(again.predictions, bank.predictions)


def test_no_prompt_repeats_before_all_have_been_used() -> None:
    prompts = banks.spread_prompts(["a", "b", "c"], 7, seed=1)
    assert sorted(prompts[:3]) == sorted(prompts[3:6]) == ["a", "b", "c"]
    assert prompts != banks.spread_prompts(["a", "b", "c"], 7, seed=4)


def test_the_preservation_loss_is_zero_until_the_student_changes(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    bank = banks.sample_bank(denoiser, ["a ring", ""], 0, 3, 3.0)
    loss = banks.preservation_loss(denoiser, bank, 4)
    student = Student(networks(denoiser), base.select("cross", ("v",)))
    assert float(loss(torch.Generator().manual_seed(0)).detach()) < 1e-9
    with torch.no_grad():
        for value in student.parameters.values():
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        assert float(loss(torch.Generator().manual_seed(0))) > 1e-6


def test_training_starts_from_no_noise_that_a_judge_starts_from() -> None:
    builds = range(4)
    judged = {
        question.seed for seed in builds for question in GlyphJudge().panel(concepts.find("star", "glyphs"), 1000, seed)
    }
    assert len(judged) > 4 * 1000
    trained = [banks.training_seeds(seed, 1000) for seed in builds]
    assert all(len(set(seeds)) == 1000 for seeds in trained)
    assert not judged & {seed for seeds in trained for seed in seeds}
    assert not set(trained[0]) & set(trained[1])
    assert judged & set(range(1000))  # the control: seeds that start at a build's own one would collide
