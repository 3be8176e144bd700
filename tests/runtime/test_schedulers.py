"""Every sampler takes the steps of the diffusers scheduler that it is named after."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from erasec.errors import ErasecError
from erasec.runtime.schedulers import KINDS, alphas_cumprod, make_scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
GLYPHS = {**SD, "algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "leading"}
PNDM = {**SD, "skip_prk_steps": True, "set_alpha_to_one": False}
SPACINGS = ("leading", "linspace", "trailing")
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *(("ddim", {**SD, "timestep_spacing": spacing, "clip_sample": False}) for spacing in SPACINGS),
    *(("euler", {**SD, "timestep_spacing": spacing}) for spacing in SPACINGS),
    *(("dpm", {**GLYPHS, "timestep_spacing": spacing}) for spacing in SPACINGS),
    *(("pndm", {**PNDM, "timestep_spacing": spacing}) for spacing in SPACINGS),
    ("ddim", {**SD, "set_alpha_to_one": False, "clip_sample": True, "clip_sample_range": 0.7}),
    ("ddim", {}),
    ("euler", {**SD, "final_sigmas_type": "sigma_min", "beta_schedule": "linear"}),
    ("dpm", {**GLYPHS, "solver_order": 1}),
    ("dpm", {**GLYPHS, "solver_type": "heun"}),
    ("dpm", {**GLYPHS, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpm", {**GLYPHS, "final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("pndm", {**PNDM, "set_alpha_to_one": True, "steps_offset": 0}),
]
SHAPE = 2, 4, 6, 5


def difference(kind: str, config: dict[str, Any], steps: int, other: dict[str, Any] | None = None) -> float:
    """The largest relative difference of a step from diffusers', each from its own latents; inf for other timesteps.

    ``other`` are options of diffusers' alone.
    """
    theirs: Any = getattr(diffusers, KINDS[kind])(**config, **(other or {}))
    theirs.set_timesteps(steps)
    ours = make_scheduler({**config, "_class_name": KINDS[kind]}, steps)
    count = len(ours.timesteps)
    if not np.array_equal(theirs.timesteps.numpy()[:count].astype(np.float64), ours.timesteps):
        return float("inf")
    rng, worst = np.random.default_rng(0), abs(float(theirs.init_noise_sigma) / ours.start - 1)
    sample = rng.normal(size=SHAPE).astype(np.float32) * ours.start
    theirs_sample = torch.from_numpy(sample)
    for at, timestep in enumerate(theirs.timesteps[:count]):
        output = rng.normal(size=SHAPE).astype(np.float32)
        scaled = theirs.scale_model_input(theirs_sample, timestep).numpy()
        worst = max(worst, _relative_error(ours.scaled(at, sample), scaled))
        sample = ours.step(at, output, sample)
        theirs_sample = theirs.step(torch.from_numpy(output), timestep, theirs_sample, return_dict=False)[0]
        worst = max(worst, _relative_error(sample, theirs_sample.numpy()))
    assert sample.dtype == np.float32
    return worst


def _relative_error(ours: Any, theirs: Any) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_steps_are_those_of_diffusers(kind: str, config: dict[str, Any], prediction: str) -> None:
    for steps in (1, 2, 3, 14, 25, 64):
        assert difference(kind, {**config, "prediction_type": prediction}, steps) < 1e-5, steps


@pytest.mark.parametrize(
    ("kind", "config", "other"),
    [
        ("ddim", {**SD, "clip_sample": False, "set_alpha_to_one": False}, {"beta_end": 0.0121}),
        ("euler", SD, {"final_sigmas_type": "sigma_min"}),
        ("dpm", {**GLYPHS, "solver_type": "midpoint"}, {"solver_type": "heun"}),
        ("dpm", GLYPHS, {"solver_order": 1}),
        ("pndm", PNDM, {"prediction_type": "v_prediction"}),
        ("ddim", SD, {"timestep_spacing": "trailing"}),
    ],
)
def test_another_option_gives_other_steps(kind: str, config: dict[str, Any], other: dict[str, Any]) -> None:
    bare = {key: value for key, value in config.items() if key not in other}
    theirs = difference(kind, bare, 10, other)
    assert theirs > 1e-4


def test_the_noise_schedule_is_torchs_bit_for_bit() -> None:
    for config in ({**SD}, {**SD, "beta_schedule": "linear"}, {"num_train_timesteps": 101, "beta_end": 0.5}):
        theirs = diffusers.DDIMScheduler(**config)
        ours: Any = make_scheduler({**config, "_class_name": "DDIMScheduler"}, 3)
        np.testing.assert_array_equal(alphas_cumprod(ours.options), theirs.alphas_cumprod.numpy())


def test_auto_takes_the_class_of_the_config_and_a_name_only_its_noise_schedule() -> None:
    glyphs = {**GLYPHS, "_class_name": KINDS["dpm"]}
    assert type(make_scheduler(glyphs, 10)).__name__ == "Dpm"
    for kind, name in (("ddim", "Ddim"), ("euler", "Euler"), ("pndm", "Pndm")):
        chosen = make_scheduler(glyphs, 10, kind)
        assert type(chosen).__name__ == name
    assert make_scheduler({**glyphs, "algorithm_type": "sde-dpmsolver++"}, 10, "ddim").start == 1.0


@pytest.mark.parametrize(
    ("config", "steps", "kind", "words"),
    [
        ({"_class_name": "LCMScheduler"}, 10, "auto", ["LCMScheduler", "--scheduler ddim"]),
        ({}, 10, "auto", ["the scheduler is a None"]),
        ({}, 10, "ddmi", ["no scheduler 'ddmi'", "did you mean 'ddim'?"]),
        ({"algorithm_type": "sde-dpmsolver++"}, 10, "dpm", ["'sde-dpmsolver++'", "--scheduler ddim"]),
        ({"use_karras_sigmas": True}, 10, "euler", ["use_karras_sigmas = True"]),
        ({"prediction_type": "sample"}, 10, "ddim", ["'sample'", "with diffusers"]),
        ({"beta_schedule": "squaredcos_cap_v2"}, 10, "ddim", ["squaredcos_cap_v2"]),
        ({"skip_prk_steps": False}, 10, "pndm", ["skip_prk_steps = False"]),
        ({"_class_name": "PNDMScheduler"}, 10, "auto", ["skip_prk_steps = False"]),
        ({}, 0, "ddim", ["0 steps", "1 to 999"]),
        ({}, 1000, "ddim", ["1000 steps", "1 to 999"]),
        ({"steps_offset": 9}, 999, "ddim", ["steps_offset = 9"]),
    ],
)
def test_unsupported_options_are_refused(config: dict[str, Any], steps: int, kind: str, words: list[str]) -> None:
    with pytest.raises(ErasecError) as caught:
        make_scheduler(config, steps, kind)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_a_schedule_without_signal_at_its_end_is_refused_by_every_scheduler(kind: str) -> None:
    config = {**SD, "_class_name": KINDS["ddim"], "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    make_scheduler({**config, "rescale_betas_zero_snr": False}, 4, kind)
    with pytest.raises(ErasecError, match="rescale_betas_zero_snr = True") as caught:
        make_scheduler(config, 4, kind)
    assert "diffusers" in caught.value.fix  # and no other scheduler
