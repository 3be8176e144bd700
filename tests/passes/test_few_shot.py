"""Few-shot unlearning: what is trained, that the error rises, its rules and its images; on glyphs what it erases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from glyph_passes import tuned
from PIL import Image
from torch import Tensor

from erasec import registry
from erasec.attention.pipeline import Sampling
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.family import FAMILIES, Site
from erasec.judging import evidence
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.model.text_encoders import TextEncoders
from erasec.model.view import Model
from erasec.passes import few_shot
from erasec.passes.few_shot import FewShot, Panel
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training import banks
from erasec.training.denoiser import Denoiser

STAR = Concept(name="star", erase=("star",), keep=("square", "circle"), templates=("{}", "a red {}"))
SMALL = tuned(FewShot, steps=2, images=2, sample_steps=3, batch=2)
FREE = replace(SMALL, stop_ratio=0.0, min_cosine=0.0, max_rise=0.0)  # no rule ends or undoes anything
CURVES = {"ratio": [1.2], "cosine": [0.99], "worse": [0.01]}
PARTS = get_args(get_type_hints(FewShot)["train"])


@pytest.fixture(scope="module")
def glyphs() -> Model:
    return loading.load("glyphs")


@pytest.fixture(scope="module")
def edit(base: Model) -> Edit:
    return FREE.solve(base, STAR, Context())


def norm(edit: Edit) -> float:
    return sum(float(delta.change(torch.zeros(1)).abs().sum()) for delta in edit.deltas.values())


def states(of: Model, prompts: list[str]) -> Tensor:
    return of.encode(prompts).states


def error(of: Model, by: Model, latents: Tensor, captions: list[str]) -> float:
    """Of the denoiser of ``of`` on fixed noise and timesteps, with the text states of ``by``."""
    panel = Panel(Denoiser(of, Context()), latents, captions, 16, 5)
    return panel.error(states(by, captions))


def test_it_trains_the_feed_forward_layers_and_the_last_attention_of_the_text_encoder(base: Model, edit: Edit) -> None:
    keys = {site.key.removeprefix("text_model.encoder.layers.") for site in edit.deltas}
    parts = [f"{number}.mlp.{name}" for number in range(4) for name in ("fc1", "fc2")]
    parts += [f"3.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    assert keys == {f"{part}.{end}" for part in parts for end in ("weight", "bias")}
    assert {site.component for site in edit.deltas} == {"text_encoder"}
    still = {site.key.split("layers.")[1] for site, delta in edit.deltas.items() if not bool(delta.value.any())}  # type: ignore[union-attr]
    assert still <= {"3.self_attn.k_proj.bias"}  # a softmax does not feel what all keys have in common


def test_each_choice_trains_what_it_names_in_encoders_of_any_depth() -> None:
    places = [("mlp.fc1", "mlp"), ("self_attn.q_proj", "q"), ("layer_norm1", "")]
    sites = [
        Site("text_encoder", f"encoder.layers.{number}.{part}.weight", (2, 2), "text", proj, "")
        for number in range(23)
        for part, proj in places
    ]
    sites += [Site("text_encoder", "embeddings.token_embedding.weight", (2, 2), "text", "", "")]
    sites += [Site("unet", "mid_block.attn2.to_q.weight", (2, 2), "cross", "q", "")]
    deep: Any = SimpleNamespace(parameters=tuple(sites), family=FAMILIES["sd1"])
    count = {train: len(tuned(FewShot, train=train).sites(deep)) for train in PARTS}
    assert count == {"mlp-final-attn": 23 + 1, "mlp": 23, "attn": 23, "mlp-attn": 46}
    (last,) = (site for site in tuned(FewShot).sites(deep) if site.proj == "q")
    assert last.key == "encoder.layers.22.self_attn.q_proj.weight"


def test_a_step_raises_the_error_on_the_concept_and_its_opposite_lowers_it(glyphs: Model) -> None:
    step = replace(FREE, steps=1, images=4, sample_steps=8, keep=0.0, batch=4)
    star = concepts.find("star", "glyphs")
    edit = step.solve(glyphs, star, Context())
    opposite = replace(edit, deltas={site: Dense(-delta.value) for site, delta in edit.deltas.items()})  # type: ignore[union-attr]
    captions = banks.concept_prompts(star, star.erase)
    latents = step.latents(Denoiser(glyphs, Context()), captions, 0)
    prompts = banks.spread_prompts(captions, 16, 0)
    before, up, down = (
        error(glyphs, by, latents, prompts) for by in (glyphs, glyphs.with_edit(edit), glyphs.with_edit(opposite))
    )
    assert up > before * 1.005
    assert down < before


def test_keep_preserves_the_text_states_of_kept_prompts(glyphs: Model) -> None:
    star = concepts.find("star", "glyphs")
    kept = banks.concept_prompts(star, star.keep)[::20]
    moved = {}
    for keep in (0.0, 20.0):
        step = replace(FREE, steps=4, lr=3e-4, sample_steps=3, keep=keep)
        after = glyphs.with_edit(step.solve(glyphs, star, Context()))
        moved[keep] = float((states(after, kept) - states(glyphs, kept)).norm())
    assert 0 < moved[20.0] < 0.7 * moved[0.0]


def test_gradients_reach_the_encoder_through_the_frozen_denoiser(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    encoders = TextEncoders(base.source)
    encoder = encoders.encoder("text_encoder")
    read = partial(denoiser.encode_prompts, encoders=encoders)
    assert torch.equal(read(["a star", ""]), denoiser.states(["a star", ""]))
    latents, noise = denoiser.draw([0, 1]), denoiser.draw([2, 3])
    few_shot.prediction_errors(
        denoiser, latents, noise, torch.tensor([300, 700]), read(["a star"] * 2)
    ).mean().backward()
    assert float(encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").grad.abs().max()) > 0
    assert all(weight.grad is None for weight in denoiser.unet.parameters())


def test_the_model_s_own_encoder_does_not_change(base: Model, edit: Edit) -> None:
    before = states(loading.load(str(base.source.root)), ["a star"])
    assert torch.equal(states(base, ["a star"]), before)
    assert not torch.equal(states(base.with_edit(edit), ["a star"]), before)


def test_it_starts_from_earlier_edits_of_the_encoder(base: Model, edit: Edit) -> None:
    """Cosines are measured against the edited model, not against the base."""
    edited = base.with_edit(edit)
    second = replace(FREE, steps=1, lr=1e-12).solve(edited, STAR, Context())
    assert second.stats["cosine"] == pytest.approx(1, abs=1e-6)
    assert torch.allclose(states(edited.with_edit(second), ["a star"]), states(edited, ["a star"]), atol=1e-6)


def test_the_error_is_against_v_where_the_model_says_v(random_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(random_folder, tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    errors = []
    for folder in (random_folder, tmp_path / "v"):
        denoiser = Denoiser(loading.load(str(folder)), Context())
        latents, noise, times = denoiser.draw([0]), denoiser.draw([1]), torch.tensor([400])
        with torch.no_grad():
            errors.append(few_shot.prediction_errors(denoiser, latents, noise, times, denoiser.states(["star"])))
            noised = denoiser.add_noise(latents, noise, times)
            prediction = denoiser.predict(noised, times, denoiser.states(["star"]))
    alpha = denoiser.alphas[400]
    wanted = (prediction - (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)).square().mean()
    assert float(errors[1]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(errors[0]) == pytest.approx(float((prediction - noise).square().mean()), rel=1e-5)
    assert float(errors[0]) != pytest.approx(float(errors[1]), rel=1e-3)
    assert FREE.solve(loading.load(str(tmp_path / "v")), STAR, Context()).deltas


@pytest.mark.parametrize("count", [1, 2, 5])
def test_timesteps_are_one_from_each_part_of_the_schedule(count: int) -> None:
    times = few_shot.stratified_timesteps(count, 1000, torch.Generator().manual_seed(0))
    edges = torch.linspace(100, 900, count + 1)
    assert bool(((times >= edges[:-1].floor()) & (times <= edges[1:])).all())
    assert not torch.equal(times, few_shot.stratified_timesteps(count, 1000, torch.Generator().manual_seed(1)))


def test_the_rules_apply_at_their_limits_and_0_turns_them_off() -> None:
    step = tuned(FewShot, stop_ratio=1.2, min_cosine=0.99, max_rise=0.01)
    assert step.stop_rule(CURVES) and not step.stop_rule(CURVES | {"ratio": [1.3, 1.19]})
    assert not step.drift_guard(CURVES)
    assert "cosine of 0.989" in step.drift_guard(CURVES | {"cosine": [0.989]})
    assert "rose by 1.1%" in step.drift_guard(CURVES | {"worse": [0.011]})
    wild = {"ratio": [9.0], "cosine": [-0.5], "worse": [9.0]}
    assert not FREE.stop_rule(wild) and not FREE.drift_guard(wild)


def test_the_guard_undoes_the_step_that_went_too_far(base: Model) -> None:
    step = replace(FREE, steps=2, lr=5e-5, keep=0.0)
    unguarded = step.solve(base, STAR, Context())
    first = unguarded.curves["cosine"]
    assert first[0] > first[1]
    guarded = replace(step, min_cosine=(first[0] + first[1]) / 2).solve(base, STAR, Context())
    one = replace(step, steps=1).solve(base, STAR, Context())
    assert guarded.stats["stopped"] == 2 and guarded.stats["steps"] == 2
    assert all(torch.equal(guarded.deltas[site].value, one.deltas[site].value) for site in one.deltas)  # type: ignore[union-attr]
    assert guarded.stats["cosine"] == pytest.approx(first[0])  # of the remaining step, not of the undone one
    assert norm(one) < norm(unguarded)


def test_a_first_step_that_goes_too_far_is_an_error_and_no_empty_edit(base: Model) -> None:
    with pytest.raises(ErasecError, match="first step on star") as caught:
        replace(FREE, min_cosine=0.999, lr=1e-3).solve(base, STAR, Context())
    assert "cosine of" in caught.value.why and "lower lr" in caught.value.fix


def test_it_ends_as_soon_as_the_concept_is_gone(base: Model, edit: Edit) -> None:
    ended = replace(FREE, stop_ratio=edit.curves["ratio"][0] * 0.999).solve(base, STAR, Context())
    assert (edit.stats["steps"], edit.stats["stopped"]) == (2, 0)
    assert (ended.stats["steps"], ended.stats["stopped"]) == (1, 1)


def picture(path: Path, width: int, height: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 - height // 2 : width // 2 + height // 2] = (255, 0, 128)
    Image.fromarray(pixels).save(path)


def test_pictures_are_cropped_to_their_centre_and_taken_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", 200, 100)
    picture(tmp_path / "a.JPG", 64, 64)
    (tmp_path / "notes.txt").write_text("no picture")
    images = few_shot.read_images(tmp_path, 4, 64)
    assert images.shape == (2, 3, 64, 64)
    assert torch.allclose(images[1].mean((1, 2)), torch.tensor([1.0, -1.0, 0.004]), atol=0.05)
    assert len(few_shot.read_images(tmp_path, 1, 64)) == 1


def test_it_learns_from_a_folder_in_place_of_its_own_pictures(base: Model, edit: Edit, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 90, 70)
    given = replace(FREE, folder=str(tmp_path)).solve(base, STAR, Context())
    assert given.deltas.keys() == edit.deltas.keys()
    assert given.curves["loss erase"] != edit.curves["loss erase"]


def test_folders_without_images_are_errors(base: Model, tmp_path: Path) -> None:
    def fails() -> ErasecError:
        with pytest.raises(ErasecError) as caught:
            replace(FREE, folder=str(tmp_path / "folder")).solve(base, STAR, Context())
        return caught.value

    assert "no such folder" in fails().why
    (tmp_path / "folder").mkdir()
    assert "holds no .png" in fails().why
    (tmp_path / "folder" / "a.png").write_text("not a picture")
    assert "a.png is not an image that can be read" in fails().what
    picture(tmp_path / "folder" / "a.png", 90, 20)
    assert "a.png is 90 x 20" in fails().what and "64 x 64" in fails().why


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "mpl"}, "did you mean 'mlp'"),
        ({"images": 0}, "at least 1"),
        ({"keep": -1.0}, "at least 0"),
        ({"min_cosine": 1.0}, "below 1"),
        ({"max_rise": -0.1}, "at least 0"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError) as caught:
        tuned(FewShot, **options)
    assert words in caught.value.why


def test_the_folder_is_a_drop_in_and_the_stock_text_encoder_undoes_it(base: Model, edit: Edit, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    edited = base.with_edit(edit)
    base.source.write(tmp_path, edited.merged())

    def shown(folder: Path, **parts: Any) -> Any:
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe("star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images

    stock = CLIPTextModel.from_pretrained(base.source.root / "text_encoder", dtype=torch.float32)
    before, after = shown(base.source.root), shown(tmp_path)
    assert not np.array_equal(before, after)
    assert np.array_equal(before, shown(tmp_path, text_encoder=stock))


def rates(glyphs: Model, edit: Edit, star: Concept, folder: Path, images: int = 8) -> dict[str, tuple[float, float]]:
    """Hit rates of the judge before and after, by group of prompts."""
    judge = registry.judge_for(glyphs)
    assert judge is not None
    glyphs.source.write(folder, glyphs.with_edit(edit).merged())
    gathered = evidence.gather_evidence(judge, [star], glyphs.source.root, folder, images, 0, Sampling(15, 4.0))
    groups = {}
    for group in ("name", "synonym", "implicit", "keep"):
        rows = evidence.rates(gathered, group)
        total = sum(row["images"] for row in rows)
        before, after = (sum(row[when] * row["images"] for row in rows) / total for when in ("before", "after"))
        groups[group] = before, after
    return groups


@pytest.mark.slow
def test_on_glyphs_the_concept_goes_the_others_stay_and_the_rule_ends_it_whatever_the_cap(
    glyphs: Model, tmp_path: Path
) -> None:
    star = concepts.find("star", "glyphs")
    edit = tuned(FewShot, steps=200).solve(glyphs, star, Context())
    assert edit.stats["stopped"] == 1
    assert edit.stats["steps"] < tuned(FewShot).steps  # so that with the default cap it is the same edit
    shares = rates(glyphs, edit, star, tmp_path)
    print(edit.stats, shares)
    for group in ("name", "synonym"):
        assert shares[group][0] > 0.8
        assert shares[group][1] <= 0.2 * shares[group][0], shares
    assert shares["keep"][1] >= shares["keep"][0] - 0.1, shares


@pytest.mark.slow
def test_on_glyphs_200_steps_without_a_rule_wreck_what_is_kept(glyphs: Model, tmp_path: Path) -> None:
    star = concepts.find("star", "glyphs")
    step = tuned(FewShot, steps=200, keep=0.0, stop_ratio=0.0, min_cosine=0.0, max_rise=0.0)
    edit = step.solve(glyphs, star, Context())
    assert edit.stats["worse"] > 0.5
    shares = rates(glyphs, edit, star, tmp_path, images=4)
    print(edit.stats, shares)
    assert shares["keep"][0] > 0.9
    assert shares["keep"][1] < shares["keep"][0] - 0.3, shares
    guarded = replace(step, min_cosine=0.98, max_rise=0.02).solve(glyphs, star, Context())
    assert guarded.stats["stopped"] == 2
    assert guarded.stats["worse"] <= 0.02


@pytest.mark.slow
def test_on_glyphs_what_is_trained_and_which_pictures_change_the_result(glyphs: Model, tmp_path: Path) -> None:
    """By how much ten steps without rules raise the error on other pictures of the concept. That feed-forward layers do
    more than attention, as the paper has it of CLIP, is not so in this encoder of four layers: 1.17 and 1.23."""
    star, heart = concepts.find("star", "glyphs"), concepts.find("heart", "glyphs")
    step = tuned(FewShot, steps=10, keep=0.0, stop_ratio=0.0, min_cosine=0.0, max_rise=0.0)
    denoiser = Denoiser(glyphs, Context())
    latents = step.latents(denoiser, banks.concept_prompts(star, star.erase), 7)
    for number, image in enumerate(
        denoiser.decode(step.latents(denoiser, banks.concept_prompts(heart, heart.erase), 8))
    ):
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    captions = banks.spread_prompts(banks.concept_prompts(star, star.erase), 16, 0)
    tries = {
        **{train: replace(step, train=train) for train in PARTS},
        "1": replace(step, images=1),
        "16": replace(step, images=16),
        "hearts": replace(step, folder=str(tmp_path)),
    }
    before = error(glyphs, glyphs, latents, captions)
    risen = {
        name: error(glyphs, glyphs.with_edit(each.solve(glyphs, star, Context())), latents, captions) / before
        for name, each in tries.items()
    }
    single = star.model_copy(update={"templates": ("{}",)})
    risen["one template"] = (
        error(glyphs, glyphs.with_edit(step.solve(glyphs, single, Context())), latents, captions) / before
    )
    print(risen)
    assert risen["mlp-attn"] > max(risen["mlp"], risen["attn"])
    assert risen["mlp-final-attn"] > 1.05
    assert len({round(value, 4) for value in risen.values()}) == len(risen), risen
