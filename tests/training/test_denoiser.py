"""The denoiser of learned passes: it predicts, samples and encodes as diffusers does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import random_models
import torch

from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.ldm.tensor_names import OLD_VAE
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.model.memory import Memory
from erasec.model.view import Model
from erasec.training.denoiser import Denoiser


def predict(denoiser: Denoiser, seed: int = 0) -> torch.Tensor:
    latents = denoiser.draw([seed, seed + 1])
    with torch.no_grad():
        return denoiser.predict(latents, torch.tensor([700, 20]), denoiser.states(["a star", ""]))


def test_it_predicts_what_diffusers_predicts(base: Model, denoiser: Denoiser) -> None:
    from diffusers import UNet2DConditionModel

    own = UNet2DConditionModel.from_pretrained(base.source.root / "unet").eval()
    with torch.no_grad():
        prediction = own(denoiser.draw([0, 1]), torch.tensor([700, 20]), denoiser.states(["a star", ""])).sample
    assert torch.equal(predict(denoiser), prediction)


def test_it_runs_with_the_model_s_edits(base: Model, denoiser: Denoiser) -> None:
    site = base.select("cross", ("v",))[0]
    edit = Edit({site: Dense(0.1 * torch.ones(site.shape))}, "hand", ("star",), "")
    edited = Denoiser(base.with_edit(edit), Context())
    assert not torch.allclose(predict(edited), predict(denoiser))
    assert torch.equal(edited.unet.get_parameter(site.key), base.with_edit(edit).merged_weight(site).float())


def test_samples_are_those_of_the_pipeline_with_ddim(base: Model, denoiser: Denoiser) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base.source.root, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    trajectories = denoiser.sample(["a star", "a red ring"], [5, 6], 4, 3.0)
    final = pipe(
        ["a star", "a red ring"],
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=denoiser.draw([5, 6]),
        output_type="latent",
    ).images
    assert torch.allclose(trajectories.final, final, atol=1e-4)
    assert trajectories.timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    # Each timestep belongs to the latents before its step: the first latents are the initial noise.
    assert torch.equal(trajectories.latents[:, 0], denoiser.draw([5, 6]))
    alone = denoiser.sample(["a red ring"], [6], 4, 3.0)
    assert torch.allclose(alone.final[0], trajectories.final[1], atol=1e-4)


def test_noise_and_targets_are_those_of_diffusers_schedule(base: Model, denoiser: Denoiser, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    latents, noise, times = denoiser.draw([1, 2]), denoiser.draw([3, 4]), torch.tensor([10, 900])
    config = base.source.config("scheduler", "scheduler_config.json")
    own = DDPMScheduler.from_config(config)
    assert torch.allclose(denoiser.add_noise(latents, noise, times), own.add_noise(latents, noise, times), atol=1e-6)
    assert torch.equal(denoiser.target(latents, noise, times), noise)
    random_models.random_folder(tmp_path / "sd2", "sd2", "tiny")
    other = Denoiser(loading.load(str(tmp_path / "sd2")), Context())
    assert other.v_prediction
    expected = DDPMScheduler.from_config(other.model.source.config("scheduler", "scheduler_config.json"))
    latents, noise = other.draw([1, 2]), other.draw([3, 4])
    assert torch.allclose(other.target(latents, noise, times), expected.get_velocity(latents, noise, times), atol=1e-6)


def test_images_come_back_from_their_latents_as_the_vae_has_them(base: Model, denoiser: Denoiser) -> None:
    from diffusers import AutoencoderKL

    own = AutoencoderKL.from_pretrained(base.source.root / "vae").eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean = own.encode(images).latent_dist.mean
        picture = own.decode(mean).sample.clamp(-1, 1)
    latents = denoiser.encode(images, batch=2)
    assert torch.allclose(latents, mean * own.config.scaling_factor, atol=1e-5)
    assert torch.allclose(denoiser.decode(latents, batch=2), picture, atol=1e-3)


def renamed(base: Model, folder: Path, names: dict[str, str]) -> Model:
    """A copy of a model whose VAE has other names for the parts of its attentions, old names by new ones."""
    shutil.copytree(base.source.root, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
    renamed_tensors = {}
    for key, tensor in tensors.items():
        for old, new in names.items():
            key = key.replace(f".{new}.", f".{old}.") if "attentions" in key else key
        renamed_tensors[key] = tensor
    assert len(renamed_tensors.keys() - tensors.keys()) == 16  # two attentions of four parts with weight and bias
    checkpoint.save_tensors(file, renamed_tensors)
    return loading.load(str(folder))


def test_a_vae_of_an_early_diffusers_is_the_present_one(base: Model, denoiser: Denoiser, tmp_path: Path) -> None:
    old = Denoiser(renamed(base, tmp_path / "old", OLD_VAE), Context())
    assert any(key.endswith(".proj_attn.weight") for key in old.model.entries("vae"))
    loaded, expected = old.vae.state_dict(), denoiser.vae.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    strange = renamed(base, tmp_path / "strange", {f"my_{new.split('.')[0]}": new for new in OLD_VAE.values()})
    with pytest.raises(ErasecError, match=r"vae has no tensor \S+attentions\.0\.to_") as caught:
        _ = Denoiser(strange, Context()).vae
    assert caught.value.why.startswith("16 of ")


@pytest.mark.parametrize("mode", ["side", "joint"])
def test_it_runs_with_the_memories_of_earlier_edits(base: Model, denoiser: Denoiser, mode: str) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2"
    rows = torch.randn(2, 4, 192, generator=torch.Generator().manual_seed(0))
    edited = base.with_edit(Edit({}, "hand", ("star",), "", memories=(Memory(attention, *rows, mode=mode),)))  # type: ignore[arg-type]
    assert float((predict(Denoiser(edited, Context())) - predict(denoiser)).abs().max()) > 1e-3
    assert torch.equal(predict(Denoiser(edited.original, Context())), predict(denoiser))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_model_that_predicts_the_picture_is_refused(base: Model, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(base.source.root, tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": kind}))
    denoiser = Denoiser(loading.load(str(folder)), Context())
    if kind == "v_prediction":
        assert denoiser.unet is not None and denoiser.v_prediction
        return
    with pytest.raises(ErasecError, match="a model that predicts 'sample' cannot be trained"):
        _ = denoiser.unet


def test_a_family_that_cannot_be_trained_is_refused(base: Model) -> None:
    untrained = replace(FAMILIES["flux"], trainable=False)
    with pytest.raises(ErasecError, match="family flux cannot be trained"):
        Denoiser(replace(base, family=untrained), Context())
