"""Learned passes on FLUX, whose guidance is distilled: with a scale to read, as FLUX.1-dev, and without, as schnell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from joint_models import pipeline

from erasec.base import Context
from erasec.commands import plan
from erasec.errors import ErasecError
from erasec.model.edit import Edit
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import from_flags
from erasec.training import banks
from erasec.training.base import Measures, TrainingContext
from erasec.training.denoiser import Denoiser

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
PROMPT, STEPS, SIDE = "a photo of a star", 4, 64
TINY = {"trajectories": 2, "sample_steps": 4, "min_noise": 0.6, "toward": "anchor", "negative_guidance": 0.5}


@pytest.fixture(scope="module", params=["flux", "flux-schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp(request.param)
    pipeline(request.param, levels=4).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(str(folder))


@pytest.fixture(scope="module")
def short(model: Model) -> Model:
    """The model with fewer tokens of T5, for trainings of a second."""
    context, pooled = model.family.streams
    context = replace(context, parts=tuple(replace(part, length=12) for part in context.parts))
    return replace(model, family=replace(model.family, streams=(context, pooled)))


def embeds(model: Model) -> bool:
    return bool(model.source.config("transformer")["guidance_embeds"])


def pipeline_latents(folder: Path, prompt: str, seed: int, guidance: float) -> torch.Tensor:
    """What FluxPipeline makes before the VAE, as latents (1, c, h, w)."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "generator": generator}
    packed = pipe(prompt, guidance_scale=guidance, output_type="latent", **options).images
    unpacked: torch.Tensor = pipe._unpack_latents(packed, SIDE, SIDE, pipe.vae_scale_factor)
    return unpacked


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_trajectories_are_those_of_the_pipeline(folder: Path, model: Model, guidance: float) -> None:
    denoiser = Denoiser(model, Context(side=SIDE))
    made = denoiser.sample([PROMPT, "a square", PROMPT], [5, 6, 7], STEPS, guidance, batch=2).final
    exact = pipeline_latents(folder, "a square", 6, guidance)
    torch.testing.assert_close(made[1:2], exact, atol=1e-4, rtol=1e-3)


def test_the_scale_of_the_guidance_is_read_where_there_is_one(model: Model) -> None:
    denoiser = Denoiser(model, Context(side=SIDE))
    states, latents, timestep = denoiser.states([PROMPT]), denoiser.draw([1]), torch.tensor([700.0])
    plain, one, more = (
        denoiser.predict(latents, timestep, states, scale) for scale in (None, torch.ones(1), torch.tensor([3.5]))
    )
    assert torch.equal(plain, one)
    assert torch.equal(plain, more) != embeds(model)
    assert denoiser.guidances(3.5) == ((1.0, 3.5) if embeds(model) else ())
    assert denoiser.guidances(1.0) == ((1.0,) if embeds(model) else ())


def test_a_bank_has_every_row_at_two_scales_with_exact_pairs(short: Model) -> None:
    """Latents and sigma of a row belong together: the recorded prediction at the sampling scale leads to the next."""
    model, denoiser = short, Denoiser(short, Context(side=SIDE))
    bank = banks.sample_bank(denoiser, [PROMPT, "a square"], 0, STEPS, 3.5)
    scales = (1.0, 3.5) if embeds(model) else (None,)
    count = 2 * STEPS
    assert len(bank.latents) == len(scales) * count
    assert (bank.guidance is None) != embeds(model)
    if bank.guidance is not None:
        assert bank.guidance.tolist() == [1.0] * count + [3.5] * count
        assert torch.equal(bank.latents[:count], bank.latents[count:])
        assert not torch.allclose(bank.predictions[:count], bank.predictions[count:], atol=1e-5)
    sigmas = torch.cat([bank.timesteps[:STEPS] / 1000, torch.zeros(1)])
    last = bank.predictions[-count:]  # those at the scale that the trajectory was sampled with
    for row in range(STEPS - 1):
        after = bank.latents[row] + (sigmas[row + 1] - sigmas[row]) * last[row]
        torch.testing.assert_close(after, bank.latents[row + 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(banks.predict_bank(denoiser, bank), bank.predictions, atol=1e-5, rtol=1e-4)


def test_targets_are_towards_the_anchor_at_the_scale_of_the_row(short: Model) -> None:
    model, denoiser = short, Denoiser(short, Context(side=SIDE))
    concept = STAR.model_copy(update={"templates": ("a {}",)})
    bank = banks.sample_bank(denoiser, ["a star"], 0, 2, 3.5)
    target = banks.esd_target(denoiser, concept, bank, 0.5, "anchor")
    index = torch.arange(len(bank.latents))
    with torch.no_grad():
        anchor = banks.predict_rows(denoiser, bank, index, ["a circle"] * len(index))
        elsewhere = banks.predict_rows(denoiser, replace(bank, guidance=None), index, ["a circle"] * len(index))
    torch.testing.assert_close(target, anchor - 0.5 * (bank.predictions - anchor), atol=1e-5, rtol=1e-4)
    assert torch.allclose(anchor, elsewhere, atol=1e-5) != embeds(model)  # the control: another scale, another target


def test_only_the_first_steps_are_trained_on(model: Model) -> None:
    denoiser = Denoiser(model, Context(side=SIDE))
    part = denoiser.noisy_steps(STEPS, 0.6)
    bank = banks.sample_bank(denoiser, [PROMPT], 0, STEPS, 3.5, part)
    assert bank.timesteps.unique().tolist() == [750.0, 1000.0]
    assert denoiser.noisy_steps(STEPS, 0.0) == slice(None) and denoiser.noisy_steps(STEPS, 0.9999) == slice(0, 1)


def solved(model: Model, context: Context | None = None, **options: object) -> Edit:
    step = Esd(**{"steps": 2, "rank": 2, **TINY, **options})  # type: ignore[arg-type]
    return next(iter(step.solve_all(model, [STAR], context or Context(side=SIDE))))


def test_esd_trains_both_streams_of_the_dual_blocks_alone(short: Model) -> None:
    model, edit = short, solved(short)
    keys = {site.key for site in edit.deltas}
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    assert keys == {f"transformer_blocks.{block}.attn.{name}.weight" for block in range(2) for name in names}
    moved = [site for site, delta in edit.deltas.items() if delta.change(model.stored_weight(site)).abs().max() > 0]
    assert len(moved) > len(keys) // 2
    single = [site for site in model.sites if site.attn == "single"]
    assert {site.proj for site in single} == {"q", "k", "v"} and all(site.key[:7] == "single_" for site in single)


def test_training_lowers_the_loss_and_keeps_the_teacher(short: Model) -> None:
    weights = {key: tensor.clone() for key, tensor in Denoiser(short, Context(side=SIDE)).unet.state_dict().items()}
    edit = solved(short, steps=16, lr=2e-2, rank=4, batch=4)
    assert edit.stats["loss erase_last"] < 0.8 * edit.stats["loss erase_first"]
    after = Denoiser(short, Context(side=SIDE)).unet.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in weights.items())


def test_the_edit_is_painted_by_the_pipeline(folder: Path, model: Model, short: Model, tmp_path: Path) -> None:
    edited = model.with_edit(solved(short, lr=1e-1))
    model.source.write(tmp_path, edited.merged())
    before, after = (pipeline_latents(root, PROMPT, 3, 3.5) for root in (folder, tmp_path))
    assert bool(after.isfinite().all()) and not torch.allclose(before, after, atol=1e-4)
    made = Denoiser(edited, Context(side=SIDE)).sample([PROMPT], [3], STEPS, 3.5).final
    torch.testing.assert_close(made, after, atol=1e-4, rtol=1e-3)


def change(edit: Edit) -> torch.Tensor:
    return torch.cat([delta.change(torch.zeros(site.shape)).flatten() for site, delta in sorted(edit.deltas.items())])


def test_micro_batches_and_resuming_give_the_same_edit(short: Model, tmp_path: Path) -> None:
    whole = change(solved(short, batch=2, steps=3))
    parts = change(solved(short, TrainingContext(side=SIDE, measures=Measures(1)), batch=2, steps=3))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-2)
    kept = TrainingContext(side=SIDE, resume_folder=tmp_path)
    first, again = (change(solved(short, kept, batch=2, steps=3)) for _ in range(2))
    assert torch.equal(first, whole) and torch.equal(again, whole) and len(list(tmp_path.iterdir())) == 1
    assert not torch.allclose(change(solved(short, batch=1, steps=3)), whole, atol=1e-6)  # the control


def test_the_unconditional_target_is_refused(model: Model) -> None:
    with pytest.raises(ErasecError, match="toward=nothing does not fit a model of the family flux") as caught:
        Esd().sites(model)
    assert "guidance is distilled" in caught.value.why and "toward=anchor" in caught.value.fix


@pytest.mark.parametrize(("shift", "expected"), [(False, [1000.0, 750.0, 500.0, 250.0]), (True, None)])
def test_a_schedule_may_depend_on_the_size_of_the_picture(
    folder: Path, tmp_path: Path, shift: bool, expected: list[float] | None
) -> None:
    import json
    import shutil

    own = Path(shutil.copytree(folder, tmp_path / "own"))
    config = own / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_shifting": shift}))
    denoiser = Denoiser(load(str(own)), Context(side=SIDE))
    made = denoiser.sample([PROMPT], [5], STEPS, 3.5)
    torch.testing.assert_close(made.final, pipeline_latents(own, PROMPT, 5, 3.5), atol=1e-4, rtol=1e-3)
    if expected:
        assert made.timesteps.tolist() == expected
    else:
        assert made.timesteps[1] != 750
    grid = denoiser.schedule.grid
    assert len(grid) == 1000 and grid[-1] == 1000 and bool((grid[1:] > grid[:-1]).all())


def test_a_plan_takes_the_settings_of_the_family(folder: Path, tmp_path: Path) -> None:
    recipe = from_flags(str(folder), erase=["star"]).model_copy(
        update={"passes": from_flags("x", passes=["esd"]).passes}
    )
    described = plan.describe(plan.make_plan(recipe, tmp_path / "out", pin=False))
    assert described["time"]["range"][1] > 0 and described["memory"]["bytes"] > 0
