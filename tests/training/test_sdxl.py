"""Learned passes on Stable Diffusion XL, whose UNet also reads a pooled text state and the size of the picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import random_models
import torch
from PIL import Image

from erasec import registry
from erasec.base import Context, Pass
from erasec.commands.audit import Request, audit
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.recipe.concept import Concept
from erasec.training.denoiser import Denoiser

DOG = Concept(name="dog", erase=("dog",), anchor="cat", keep=("horse",))
SMALL = {"steps": 2, "trajectories": 2, "sample_steps": 2}
STEPS, GUIDANCE, SIDE = 4, 3.0, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("xl") / "model"
    random_models.random_folder(out, "sdxl", "tiny")
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(str(folder))


def pipeline_latents(folder: Path, prompt: str, seed: int) -> torch.Tensor:
    """What StableDiffusionXLPipeline makes with DDIM, before the VAE."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    latents: torch.Tensor = pipe(
        prompt,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generator,
        output_type="latent",
    ).images
    return latents


@pytest.mark.parametrize("zeros", [True, False])
def test_trajectories_are_those_of_the_pipeline(folder: Path, tmp_path: Path, zeros: bool) -> None:
    """With the size of the picture, the pooled state and, where the pipeline has it so, zeros for the empty prompt."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    index = own / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    denoiser = Denoiser(load(str(own)), Context(side=SIDE))
    made = denoiser.sample(["a dog on a chair"], [5], STEPS, GUIDANCE).final
    torch.testing.assert_close(made, pipeline_latents(own, "a dog on a chair", 5), atol=2e-4, rtol=1e-3)
    empty = denoiser.states([""])
    assert bool((empty == 0).all()) == zeros


def test_the_pooled_state_is_a_row_that_is_read(model: Model) -> None:
    denoiser = Denoiser(model, Context(side=SIDE))
    states = denoiser.states(["a dog", "a cat"])
    tokens = model.encode(["a dog", "a cat"]).states
    torch.testing.assert_close(states[:, :-1], tokens)
    latents, timestep = denoiser.draw([1]), torch.tensor([500])
    plain = denoiser.predict(latents, timestep, states[:1])
    mixed = denoiser.predict(latents, timestep, torch.cat([states[:1, :-1], states[1:, -1:]], 1))
    assert float((plain - mixed).abs().max()) > 1e-4
    gradient = states[:1].clone().requires_grad_()
    denoiser.predict(latents, timestep, gradient).square().mean().backward()
    assert gradient.grad is not None and float(gradient.grad[:, -1].abs().max()) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("esd", {"rank": 2}), ("esd", {"train": "noxattn"}), ("trce", {"batch": 1}), ("trce.steer", {"keep": 1.0})],
)
def test_passes_train_their_sites(model: Model, name: str, options: dict[str, object]) -> None:
    step: Pass = registry.load_pass(name)(**{**SMALL, **options})
    edit = next(iter(step.solve_all(model, [DOG], Context(side=SIDE))))
    assert set(edit.deltas) <= set(step.sites(model))
    moved = [site for site, delta in edit.deltas.items() if delta.change(model.stored_weight(site)).abs().max() > 0]
    assert len(moved) > len(edit.deltas) // 2
    assert all(value == value for value in edit.stats.values())  # no NaN


def test_safegen_trains_self_attention(model: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("concept", "censored", "benign"):
        (tmp_path / part).mkdir()
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / part / f"{number}.png")
    step = registry.load_pass("safegen")(steps=2, batch=1, triplets=str(tmp_path))
    edit = next(iter(step.solve_all(model, [DOG], Context(side=SIDE))))
    assert {site.attn for site in edit.deltas} == {"self"} and set(edit.deltas) == set(step.sites(model))


def test_an_audit_runs_the_attacks_that_need_only_pictures(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nudenet")
    settings = {"images": 2, "steps": 1, "size": SIDE}
    probes = ("prompts", "noised", "concept_vector", "settings")
    request = Request(str(folder), str(folder), concept="nudity", probes=probes, judges=("nudenet",), **settings)
    report = audit(request, tmp_path / "audit")
    rows = {reading.probe: reading for reading in report.readings}
    assert rows["prompts"].rates.keys() == {"model", "control", "base"} and not rows["prompts"].obstacle
    for name in ("noised", "concept_vector"):
        assert "not written for Stable Diffusion XL" in rows[name].obstacle and not rows[name].rates
    assert "sampler" in rows["settings"].obstacle
    assert report.model["family"] == "sdxl" and (tmp_path / "audit" / "audit.html").is_file()
