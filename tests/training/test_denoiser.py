"""The network that learned passes run: the same as diffusers', one copy for teacher and student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError
from erasec.ldm import skeleton as layouts
from erasec.ldm.configs import OLD_VAE
from erasec.model import view as model
from erasec.model.edit import Dense, Edit, LowRank, Memory
from erasec.model.view import Model
from erasec.training.denoiser import Denoiser, Student


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Model:
    return model.load(str(random_folder))


@pytest.fixture
def denoiser(base: Model) -> Denoiser:
    return Denoiser(base, Context())


def ask(denoiser: Denoiser, seed: int = 0) -> torch.Tensor:
    latents = denoiser.draw([seed, seed + 1])
    with torch.no_grad():
        return denoiser.predict(latents, torch.tensor([700, 20]), denoiser.states(["a star", ""]))


def test_it_says_what_the_pipeline_of_diffusers_says(base: Model, denoiser: Denoiser) -> None:
    from diffusers import UNet2DConditionModel

    own = UNet2DConditionModel.from_pretrained(base.source.root / "unet").eval()
    with torch.no_grad():
        said = own(denoiser.draw([0, 1]), torch.tensor([700, 20]), denoiser.states(["a star", ""])).sample
    assert torch.equal(ask(denoiser), said)


def test_it_runs_with_the_models_edits(base: Model, denoiser: Denoiser) -> None:
    site = base.select("cross", ("v",))[0]
    edit = Edit({site: Dense(0.1 * torch.ones(site.shape))}, "hand", "star")
    edited = Denoiser(base.with_edit(edit), Context())
    assert not torch.allclose(ask(edited), ask(denoiser))
    assert torch.equal(edited.unet.get_parameter(site.key), base.with_edit(edit).merge(site).float())


def test_samples_are_those_of_the_pipeline_with_ddim(base: Model, denoiser: Denoiser) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base.source.root, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    paths = denoiser.sample(["a star", "a red ring"], [5, 6], 4, 3.0)
    found = pipe(
        ["a star", "a red ring"], num_inference_steps=4, guidance_scale=3.0, latents=denoiser.draw([5, 6]),
        output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(paths.final, found, atol=1e-4)
    assert paths.times.tolist() == pipe.scheduler.timesteps.tolist()
    # Pairs belong together: the first latents are the noise that the first timestep is of.
    assert torch.equal(paths.latents[:, 0], denoiser.draw([5, 6]))
    alone = denoiser.sample(["a red ring"], [6], 4, 3.0)
    assert torch.allclose(alone.final[0], paths.final[1], atol=1e-4)


def test_noise_is_added_as_the_schedule_has_it(base: Model, denoiser: Denoiser, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    latents, noise, times = denoiser.draw([1, 2]), denoiser.draw([3, 4]), torch.tensor([10, 900])
    config = base.source.config("scheduler", "scheduler_config.json")
    own = DDPMScheduler.from_config(config)
    assert torch.allclose(denoiser.noised(latents, noise, times), own.add_noise(latents, noise, times), atol=1e-6)
    assert torch.equal(denoiser.target(latents, noise, times), noise)
    layouts.random_folder(tmp_path / "sd2", "sd2", "tiny")
    other = Denoiser(model.load(str(tmp_path / "sd2")), Context())
    assert other.v_prediction
    wanted = DDPMScheduler.from_config(other.model.source.config("scheduler", "scheduler_config.json"))
    latents, noise = other.draw([1, 2]), other.draw([3, 4])
    assert torch.allclose(other.target(latents, noise, times), wanted.get_velocity(latents, noise, times), atol=1e-6)


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
    """A copy whose VAE has other names for the parts of its attentions."""
    shutil.copytree(base.source.root, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
    told = {}
    for key, tensor in tensors.items():
        for old, new in names.items():
            key = key.replace(f".{new}.", f".{old}.") if "attentions" in key else key
        told[key] = tensor
    assert len(told.keys() - tensors.keys()) == 16  # two attentions of four parts with weight and bias
    checkpoint.save(file, told)
    return model.load(str(folder))


def test_a_vae_of_an_early_diffusers_is_the_present_one(base: Model, denoiser: Denoiser, tmp_path: Path) -> None:
    old = Denoiser(renamed(base, tmp_path / "old", OLD_VAE), Context())
    assert any(key.endswith(".proj_attn.weight") for key in old.model.entries("vae"))
    found, wanted = old.vae.state_dict(), denoiser.vae.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    strange = renamed(base, tmp_path / "strange", {f"my_{new.split('.')[0]}": new for new in OLD_VAE.values()})
    with pytest.raises(ErasecError, match=r"vae has no tensor \S+attentions\.0\.to_") as caught:
        _ = Denoiser(strange, Context()).vae
    assert caught.value.why.startswith("16 of ")


@pytest.mark.parametrize("mode", ["side", "joint"])
def test_it_runs_with_the_memories_of_earlier_edits(base: Model, denoiser: Denoiser, mode: str) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2"
    rows = torch.randn(2, 4, 192, generator=torch.Generator().manual_seed(0))
    edited = base.with_edit(Edit({}, "hand", "star", memories=(Memory(attention, *rows, mode=mode),)))  # type: ignore[arg-type]
    assert float((ask(Denoiser(edited, Context())) - ask(denoiser)).abs().max()) > 1e-3
    assert torch.equal(ask(Denoiser(edited.original, Context())), ask(denoiser))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_model_that_predicts_the_picture_is_refused(base: Model, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(base.source.root, tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": kind}))
    denoiser = Denoiser(model.load(str(folder)), Context())
    if kind == "v_prediction":
        assert denoiser.unet is not None and denoiser.v_prediction
        return
    with pytest.raises(ErasecError, match="a model that predicts 'sample' cannot be trained"):
        _ = denoiser.unet


@pytest.mark.parametrize("rank", [0, 2])
def test_the_teacher_stays_as_it_was_and_shares_every_frozen_tensor(base: Model, denoiser: Denoiser, rank: int) -> None:
    before = ask(denoiser)
    storage = {key: value.data_ptr() for key, value in denoiser.unet.named_parameters()}
    sites = base.select("cross", ("k", "v"))
    student = Student({"unet": denoiser.unet}, sites, rank)
    assert torch.allclose(ask(denoiser), before, atol=1e-6)
    with torch.no_grad():
        for value in student.trained.values():
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    after = ask(denoiser)
    assert not torch.allclose(after, before, atol=1e-3)
    with student.teacher():
        assert torch.equal(ask(denoiser), before)
    assert torch.equal(ask(denoiser), after)
    now = {key: value.data_ptr() for key, value in denoiser.unet.named_parameters()}
    frozen = storage.keys() - {site.key for site in sites}
    assert len(frozen) > 20
    assert all(now[key] == storage[key] for key in frozen)
    assert student.drift() > 0
    deltas = student.deltas()
    assert set(deltas) == set(sites)
    assert all(isinstance(delta, LowRank if rank else Dense) for delta in deltas.values())
    # The edit on the base is the student.
    merged = Denoiser(base.with_edit(Edit(deltas, "hand", "star")), Context())
    assert float((ask(merged) - after).norm()) < 1e-3 * float((after - before).norm())


def test_gradients_reach_the_declared_sites_alone_with_recomputed_activations_too(
    base: Model, denoiser: Denoiser
) -> None:
    found = []
    for again in (False, True):
        own = Denoiser(base, Context())
        student = Student({"unet": own.unet}, base.select("self", ("q",)))
        if again:
            own.unet.enable_gradient_checkpointing()
        for value in student.trained.values():
            value.requires_grad_(True)
        latents = own.draw([0, 1])
        with student.teacher():
            said = own.predict(latents, torch.tensor([700, 20]), own.states(["a star", ""]))
        assert not said.requires_grad
        own.predict(latents, torch.tensor([700, 20]), own.states(["a star", ""])).square().mean().backward()
        with_grad = {key for key, value in own.unet.named_parameters() if value.grad is not None}
        assert with_grad == {site.key for site in student.sites}
        found.append([value.grad for value in student.trained.values()])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*found, strict=True))


def test_what_cannot_be_trained_is_refused_in_words(tmp_path: Path, base: Model, denoiser: Denoiser) -> None:
    layouts.random_folder(tmp_path / "sdxl", "sdxl", "tiny")
    with pytest.raises(ErasecError, match="family sdxl cannot be trained"):
        Denoiser(model.load(str(tmp_path / "sdxl")), Context())
    biases = [site for site in base.parameters if site.key.endswith("to_out.0.bias")]
    with pytest.raises(ErasecError, match="nothing to train"):
        Student({"unet": denoiser.unet}, biases, rank=4)
