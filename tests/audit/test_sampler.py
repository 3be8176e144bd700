"""The sampler of the probes is DDIM, with the noise that the formulas say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from erasec.audit.sampler import add_noise, ddim_step, make_schedule, sample
from erasec.audit.subject import Subject, Untrained
from erasec.base import Context
from erasec.model.loading import load


@pytest.fixture(scope="module")
def subject(random_folder: Path) -> Subject:
    return Subject("model", load(str(random_folder)), Context())


def test_without_noise_it_takes_the_steps_of_diffusers(subject: Subject) -> None:
    from diffusers import DDIMScheduler

    config = dict(subject.model.source.config("scheduler", "scheduler_config.json"))
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(6)
    latents, states = subject.noise([1, 2]), subject.states(["a", "b"])
    expected = latents
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            noise = subject.predicted_noise(expected, int(timestep), states, 3.0)
            expected = scheduler.step(noise, timestep, expected).prev_sample
    found = sample(subject, states, latents, 6, 3.0)
    assert torch.allclose(found, expected, atol=1e-5)
    assert make_schedule(subject.model, 6).timesteps == tuple(int(step) for step in scheduler.timesteps)


def test_eta_1_is_the_ancestral_step_of_diffusers(subject: Subject) -> None:
    from diffusers import DDIMScheduler

    config = dict(subject.model.source.config("scheduler", "scheduler_config.json"))
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(6)
    schedule = make_schedule(subject.model, 6)
    latents, noise, extra = (torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    expected = scheduler.step(noise, schedule.timesteps[2], latents, eta=1.0, variance_noise=extra).prev_sample
    found = ddim_step(latents, noise, schedule.alphas[2], schedule.following[2], 1.0, extra)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_scale_of_the_noise_scales_its_variance(subject: Subject) -> None:
    schedule = make_schedule(subject.model, 6)
    alpha, following = schedule.alphas[1], schedule.following[1]
    latents, noise = torch.zeros(1, 4, 64, 64), torch.zeros(1, 4, 64, 64)
    extra = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    plain = ddim_step(latents, noise, alpha, following, 1.0, extra)
    scaled = ddim_step(latents, noise, alpha, following, 1.0, 1.04 * extra)
    sigma = ((1 - following) / (1 - alpha) * (1 - alpha / following)) ** 0.5
    assert float(plain.std()) == pytest.approx(sigma, rel=0.02)
    assert float(scaled.std() / plain.std()) == pytest.approx(1.04, rel=1e-5)


def test_the_noise_of_a_picture_does_not_depend_on_the_batch(subject: Subject) -> None:
    latents, states = subject.noise([5, 6, 7]), subject.states(["a", "b", "c"])
    together = sample(subject, states, latents, 3, 1.0, eta=1.2, noise_scale=1.03, seeds=[8, 9, 10])
    alone = sample(subject, states[1:2], latents[1:2], 3, 1.0, eta=1.2, noise_scale=1.03, seeds=[9])
    other = sample(subject, states[1:2], latents[1:2], 3, 1.0, eta=1.2, noise_scale=1.03, seeds=[11])
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert not torch.allclose(alone, other, atol=1e-2)


def test_steps_can_be_split(subject: Subject) -> None:
    latents, states = subject.noise([3]), subject.states(["a"])
    whole = sample(subject, states, latents, 5, 2.0)
    begun = sample(subject, states, latents, 5, 2.0, last=2)
    assert torch.allclose(sample(subject, states, begun, 5, 2.0, first=2), whole, atol=1e-6)
    assert not torch.allclose(begun, whole)


def test_a_nudge_changes_predictions_and_after_changes_latents(subject: Subject) -> None:
    latents, states = subject.noise([3]), subject.states(["a"])
    plain = sample(subject, states, latents, 3, 1.0)
    same = sample(
        subject, states, latents, 3, 1.0, nudge=lambda noise, x, number: noise, after=lambda x, number, rows: x
    )
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, sample(subject, states, latents, 3, 1.0, nudge=lambda noise, x, number: 0 * noise))
    assert not sample(subject, states, latents, 3, 1.0, after=lambda x, number, rows: 0 * x).any()


def test_pictures_of_prompts_are_those_of_the_sampler(subject: Subject) -> None:
    prompts, seeds = ["a", "b"], [4, 5]
    pictures = subject.pictures(prompts, seeds, 4, 3.0)
    latents = sample(subject, subject.states(prompts), subject.noise(seeds), 4, 3.0)
    difference = np.abs(pictures.astype(int) - subject.decode(latents))
    assert difference.max() <= 2
    assert pictures.std() > 1


def test_an_untrained_denoiser_has_other_weights_and_always_the_same(subject: Subject) -> None:
    first, second = (Untrained("random", subject.model, Context()) for _ in range(2))
    name, weight = next(iter(first.denoiser.unet.named_parameters()))
    assert torch.equal(weight, dict(second.denoiser.unet.named_parameters())[name])
    assert not torch.equal(weight, dict(subject.denoiser.unet.named_parameters())[name])
    assert first.digest != subject.digest


def test_noise_is_added_with_the_square_roots_of_alpha() -> None:
    clean, noise = torch.full((1, 1, 2, 2), 2.0), torch.ones(1, 1, 2, 2)
    assert torch.allclose(add_noise(clean, noise, 0.64), torch.full((1, 1, 2, 2), 0.8 * 2 + 0.6))
