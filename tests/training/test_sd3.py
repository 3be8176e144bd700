"""Learned passes on Stable Diffusion 3: velocities of a rectified flow, by a transformer that reads a pooled state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from joint_models import pipeline

from erasec import registry
from erasec.base import Context, Pass
from erasec.commands import plan
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import from_flags
from erasec.training import banks
from erasec.training.denoiser import Denoiser

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
SMALL = {"steps": 2, "trajectories": 2, "sample_steps": 3}
PROMPT, STEPS, GUIDANCE = "a photo of a star", 4, 3.0


@pytest.fixture(scope="module", params=["sd3", "sd3-no-t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp(request.param)
    pipeline(request.param).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(str(folder))


def pipeline_latents(folder: Path, seed: int) -> torch.Tensor:
    from diffusers import StableDiffusion3Pipeline

    without = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipe.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipe(
        PROMPT,
        height=8,
        width=8,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=256,
        output_type="latent",
    ).images
    return latents


def test_trajectories_are_those_of_the_pipeline(folder: Path, model: Model) -> None:
    denoiser = Denoiser(model, Context())
    made = denoiser.sample([PROMPT, PROMPT, "a square"], [5, 6, 7], STEPS, GUIDANCE, batch=2)
    for row, seed in enumerate((5, 6)):
        torch.testing.assert_close(made.final[row : row + 1], pipeline_latents(folder, seed), atol=1e-4, rtol=1e-3)
    assert made.timesteps.is_floating_point()  # a cast to whole steps would move the noise level


def test_a_row_of_a_bank_is_the_latents_at_its_timestep(model: Model) -> None:
    """The prediction of a recorded row is the one that was recorded, and the Euler steps lead to the recorded end."""
    denoiser = Denoiser(model, Context())
    bank = banks.sample_bank(denoiser, [PROMPT], 0, STEPS, GUIDANCE)
    torch.testing.assert_close(banks.predict_bank(denoiser, bank), bank.predictions, atol=1e-5, rtol=1e-4)
    sigmas = torch.cat([bank.timesteps / 1000, torch.zeros(1)])
    guided = bank.unconditional + GUIDANCE * (bank.predictions - bank.unconditional)
    for row in range(STEPS - 1):
        after = bank.latents[row] + (sigmas[row + 1] - sigmas[row]) * guided[row]
        torch.testing.assert_close(after, bank.latents[row + 1], atol=1e-5, rtol=1e-4)


def test_the_pooled_state_alone_moves_the_prediction(model: Model) -> None:
    denoiser = Denoiser(model, Context())
    states, latents = denoiser.states(["a star", "a square"]), denoiser.draw([1])
    plain = denoiser.predict(latents, torch.tensor([700.0]), states[:1])
    mixed = denoiser.predict(latents, torch.tensor([700.0]), torch.cat([states[:1, :-1], states[1:, -1:]], 1))
    assert float((plain - mixed).abs().max()) > 1e-5


@pytest.mark.parametrize("options", [{"rank": 2}, {"train": "noxattn"}, {"keep": 1.0, "toward": "anchor"}])
def test_esd_trains_its_sites(model: Model, options: dict[str, object]) -> None:
    step: Pass = registry.load_pass("esd")(**{**SMALL, **options})
    edit = next(iter(step.solve_all(model, [STAR], Context())))
    assert set(edit.deltas) == set(step.sites(model))
    moved = [site for site, delta in edit.deltas.items() if delta.change(model.stored_weight(site)).abs().max() > 0]
    assert len(moved) > len(edit.deltas) // 2
    own = {(site.attn, site.proj) for site in edit.deltas}
    text = {(attn, proj) for attn in ("joint", "context") for proj in ("q", "k", "v")}
    assert own.isdisjoint(text) if options.get("train") == "noxattn" else own == text


def test_training_moves_the_prediction_towards_the_target(model: Model) -> None:
    """With a large rate and many steps the loss of the erased prompts comes down."""
    step = Esd(steps=60, lr=1e-2, trajectories=2, sample_steps=3, batch=4)
    edit = next(iter(step.solve_all(model, [STAR], Context())))
    assert edit.stats["loss erase_last"] < 0.7 * edit.stats["loss erase_first"]


def test_a_plan_counts_the_training(folder: Path, tmp_path: Path) -> None:
    passes = from_flags("x", passes=["esd:steps=5,rank=4"]).passes
    recipe = from_flags(str(folder), erase=["star"]).model_copy(update={"passes": passes})
    described = plan.describe(plan.make_plan(recipe, tmp_path / "out", pin=False))
    assert described["time"]["range"][1] > 0 and described["memory"]["bytes"] > 0
