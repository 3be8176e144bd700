"""Few-shot erasing: what is trained, that its sign is up, its rules, its pictures; on glyphs what it erases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.family import Site
from erasec.judging import validate
from erasec.judging.judge import Sampling
from erasec.model import view as model
from erasec.model.edit import Dense, Edit
from erasec.model.text_encoders import Texts, load_encoder
from erasec.model.view import Model
from erasec.passes import few_shot
from erasec.passes.few_shot import FewShot, Panel
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training import base as learned
from erasec.training.denoiser import Denoiser

STAR = Concept(name="star", erase=("star",), keep=("square", "circle"), templates=("{}", "a red {}"))
SMALL = FewShot(steps=2, images=2, path=3, batch=2)
FREE = replace(SMALL, ratio=0.0, cosine=0.0, worse=0.0)  # no rule ends or undoes anything
RULES = {"ratio": [1.2], "cosine": [0.99], "worse": [0.01]}


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Model:
    return model.load(str(random_folder))


@pytest.fixture(scope="module")
def glyphs() -> Model:
    return model.load("glyphs")


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
    found = [
        Site("text_encoder", f"encoder.layers.{number}.{part}.weight", (2, 2), "text", proj, "")
        for number in range(23) for part, proj in places
    ]  # fmt: skip
    found += [Site("text_encoder", "embeddings.token_embedding.weight", (2, 2), "text", "", "")]
    found += [Site("unet", "mid_block.attn2.to_q.weight", (2, 2), "cross", "q", "")]
    deep: Any = SimpleNamespace(
        parameters=tuple(found), family=SimpleNamespace(name="sd1", text_encoders=("text_encoder",))
    )
    count = {train: len(FewShot(train=train).sites(deep)) for train in few_shot.PARTS}
    assert count == {"mlp-final-attn": 23 + 1, "mlp": 23, "attn": 23, "mlp-attn": 46}
    (last,) = (site for site in FewShot().sites(deep) if site.proj == "q")
    assert last.key == "encoder.layers.22.self_attn.q_proj.weight"


def test_a_step_raises_the_error_on_the_concept_and_its_opposite_lowers_it(glyphs: Model) -> None:
    step = replace(FREE, steps=1, images=4, path=8, keep=0.0, batch=4)
    star = concepts.find("star")
    edit = step.solve(glyphs, star, Context())
    opposite = replace(edit, deltas={site: Dense(-delta.value) for site, delta in edit.deltas.items()})  # type: ignore[union-attr]
    captions = learned.texts(star, star.erase)
    latents = step.latents(Denoiser(glyphs, Context()), captions, 0)
    said = learned.spread(captions, 16, 0)
    before, up, down = (
        error(glyphs, by, latents, said) for by in (glyphs, glyphs.with_edit(edit), glyphs.with_edit(opposite))
    )
    assert up > before * 1.005
    assert down < before


def test_what_is_kept_moves_less_where_it_is_held(glyphs: Model) -> None:
    star = concepts.find("star")
    kept = learned.texts(star, star.keep)[::20]
    moved = {}
    for keep in (0.0, 20.0):
        step = replace(FREE, steps=4, lr=3e-4, path=3, keep=keep)
        after = glyphs.with_edit(step.solve(glyphs, star, Context()))
        moved[keep] = float((states(after, kept) - states(glyphs, kept)).norm())
    assert 0 < moved[20.0] < 0.7 * moved[0.0]


def test_gradients_reach_the_encoder_through_the_frozen_denoiser(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    encoder = load_encoder(base.source, "text_encoder")
    read = few_shot.reader(encoder, Texts(base.source), "text_encoder")
    assert torch.equal(read(["a star", ""]), denoiser.states(["a star", ""]))
    latents, noise = denoiser.draw([0, 1]), denoiser.draw([2, 3])
    few_shot.errors(denoiser, latents, noise, torch.tensor([300, 700]), read(["a star"] * 2)).mean().backward()  # type: ignore[no-untyped-call]
    assert float(encoder.get_parameter("encoder.layers.0.mlp.fc1.weight").grad.abs().max()) > 0
    assert all(weight.grad is None for weight in denoiser.unet.parameters())


def test_the_model_s_own_encoder_is_not_touched(base: Model, edit: Edit) -> None:
    before = states(model.load(str(base.source.root)), ["a star"])
    assert torch.equal(states(base, ["a star"]), before)
    assert not torch.equal(states(base.with_edit(edit), ["a star"]), before)


def test_it_starts_from_earlier_edits_of_the_encoder(base: Model, edit: Edit) -> None:
    """Its first state is that of the edited model: what it calls still is so there, and not of the base."""
    edited = base.with_edit(edit)
    made = replace(FREE, steps=1, lr=1e-12).solve(edited, STAR, Context())
    assert made.stats["cosine"] == pytest.approx(1, abs=1e-6)
    assert torch.allclose(states(edited.with_edit(made), ["a star"]), states(edited, ["a star"]), atol=1e-6)


def test_the_error_is_against_v_where_the_model_says_v(random_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(random_folder, tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    found = []
    for folder in (random_folder, tmp_path / "v"):
        denoiser = Denoiser(model.load(str(folder)), Context())
        latents, noise, times = denoiser.draw([0]), denoiser.draw([1]), torch.tensor([400])
        with torch.no_grad():
            found.append(few_shot.errors(denoiser, latents, noise, times, denoiser.states(["star"])))
            noised = denoiser.noised(latents, noise, times)
            said = denoiser.predict(noised, times, denoiser.states(["star"]))
    alpha = denoiser.alphas[400]
    wanted = (said - (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)).square().mean()
    assert float(found[1]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(found[0]) == pytest.approx(float((said - noise).square().mean()), rel=1e-5)
    assert float(found[0]) != pytest.approx(float(found[1]), rel=1e-3)
    assert FREE.solve(model.load(str(tmp_path / "v")), STAR, Context()).deltas


@pytest.mark.parametrize("count", [1, 2, 5])
def test_timesteps_are_one_from_each_part_of_the_schedule(count: int) -> None:
    times = few_shot.strata(count, 1000, torch.Generator().manual_seed(0))
    edges = torch.linspace(100, 900, count + 1)
    assert bool(((times >= edges[:-1].floor()) & (times <= edges[1:])).all())
    assert not torch.equal(times, few_shot.strata(count, 1000, torch.Generator().manual_seed(1)))


def test_the_rules_speak_at_their_limits_and_0_leaves_them_out() -> None:
    step = FewShot(ratio=1.2, cosine=0.99, worse=0.01)
    assert step.gone(RULES) and not step.gone(RULES | {"ratio": [1.3, 1.19]})
    assert not step.too_far(RULES)
    assert "cosine of 0.989" in step.too_far(RULES | {"cosine": [0.989]})
    assert "rose by 1.1%" in step.too_far(RULES | {"worse": [0.011]})
    wild = {"ratio": [9.0], "cosine": [-0.5], "worse": [9.0]}
    assert not FREE.gone(wild) and not FREE.too_far(wild)


def test_the_guard_takes_back_the_step_that_went_too_far(base: Model) -> None:
    step = replace(FREE, steps=2, lr=5e-5, keep=0.0)
    free = step.solve(base, STAR, Context())
    first = free.curves["cosine"]
    assert first[0] > first[1]
    held = replace(step, cosine=(first[0] + first[1]) / 2).solve(base, STAR, Context())
    one = replace(step, steps=1).solve(base, STAR, Context())
    assert held.stats["stopped"] == 2 and held.stats["steps"] == 2
    assert all(torch.equal(held.deltas[site].value, one.deltas[site].value) for site in one.deltas)  # type: ignore[union-attr]
    assert held.stats["cosine"] == pytest.approx(first[0])  # of what is left, not of what was taken back
    assert norm(one) < norm(free)


def test_a_first_step_that_goes_too_far_is_an_error_and_no_empty_edit(base: Model) -> None:
    with pytest.raises(ErasecError, match="first step on star") as caught:
        replace(FREE, cosine=0.999, lr=1e-3).solve(base, STAR, Context())
    assert "cosine of" in caught.value.why and "lower lr" in caught.value.fix


def test_it_ends_as_soon_as_the_concept_is_gone(base: Model, edit: Edit) -> None:
    ended = replace(FREE, ratio=edit.curves["ratio"][0] * 0.999).solve(base, STAR, Context())
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
    found = few_shot.pictures(tmp_path, 4, 64)
    assert found.shape == (2, 3, 64, 64)
    assert torch.allclose(found[1].mean((1, 2)), torch.tensor([1.0, -1.0, 0.004]), atol=0.05)
    assert len(few_shot.pictures(tmp_path, 1, 64)) == 1


def test_it_learns_from_a_folder_in_place_of_its_own_pictures(base: Model, edit: Edit, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 90, 70)
    given = replace(FREE, folder=str(tmp_path)).solve(base, STAR, Context())
    assert given.deltas.keys() == edit.deltas.keys()
    assert given.curves["loss erase"] != edit.curves["loss erase"]


def test_folders_without_pictures_are_errors_in_words(base: Model, tmp_path: Path) -> None:
    def fails() -> ErasecError:
        with pytest.raises(ErasecError) as caught:
            replace(FREE, folder=str(tmp_path / "folder")).solve(base, STAR, Context())
        return caught.value

    assert "no such folder" in fails().why
    (tmp_path / "folder").mkdir()
    assert "holds no .png" in fails().why
    (tmp_path / "folder" / "a.png").write_text("not a picture")
    assert "a.png is no picture" in fails().what
    picture(tmp_path / "folder" / "a.png", 90, 20)
    assert "a.png is 90 x 20" in fails().what and "64 x 64" in fails().why


@pytest.mark.parametrize(
    ("options", "words"),
    [({"train": "mpl"}, "did you mean 'mlp'"), ({"images": 0}, "1 or more"), ({"keep": -1.0}, "0 or more"),
     ({"cosine": 1.0}, "less than 1"), ({"worse": -0.1}, "0 or more")],
)  # fmt: skip
def test_bad_options_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError) as caught:
        FewShot(**options)
    assert words in caught.value.why


def test_the_folder_is_a_drop_in_and_the_stock_text_encoder_undoes_it(base: Model, edit: Edit, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    edited = base.with_edit(edit)
    base.source.write(tmp_path, edited.merged())

    def shown(folder: Path, **parts: Any) -> Any:
        made = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32, **parts)
        made.set_progress_bar_config(disable=True)
        return made("star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images

    stock = CLIPTextModel.from_pretrained(base.source.root / "text_encoder", dtype=torch.float32)
    before, after = shown(base.source.root), shown(tmp_path)
    assert not np.array_equal(before, after)
    assert np.array_equal(before, shown(tmp_path, text_encoder=stock))


def rates(glyphs: Model, edit: Edit, star: Concept, folder: Path, images: int = 8) -> dict[str, tuple[float, float]]:
    """Hit rates of the judge before and after, by group of prompts."""
    judge = validate.judge_of(glyphs)
    assert judge is not None
    glyphs.source.write(folder, glyphs.with_edit(edit).merged())
    found = validate.gather(judge, [star], glyphs.source.root, folder, images, 0, Sampling(15, 4.0))
    groups = {}
    for group in ("name", "synonym", "implicit", "keep"):
        rows = validate.rates(found, group)
        total = sum(row["images"] for row in rows)
        before, after = (sum(row[when] * row["images"] for row in rows) / total for when in ("before", "after"))
        groups[group] = before, after
    return groups


@pytest.mark.slow
def test_on_glyphs_the_concept_goes_the_others_stay_and_the_rule_ends_it_whatever_the_cap(
    glyphs: Model, tmp_path: Path
) -> None:
    star = concepts.find("star")
    edit = FewShot(steps=200).solve(glyphs, star, Context())
    assert edit.stats["stopped"] == 1
    assert edit.stats["steps"] < FewShot().steps  # so that with the default cap it is the same edit
    found = rates(glyphs, edit, star, tmp_path)
    print(edit.stats, found)
    for group in ("name", "synonym"):
        assert found[group][0] > 0.8
        assert found[group][1] <= 0.2 * found[group][0], found
    assert found["keep"][1] >= found["keep"][0] - 0.1, found


@pytest.mark.slow
def test_on_glyphs_200_steps_without_a_rule_wreck_what_is_kept(glyphs: Model, tmp_path: Path) -> None:
    star = concepts.find("star")
    step = FewShot(steps=200, keep=0.0, ratio=0.0, cosine=0.0, worse=0.0)
    edit = step.solve(glyphs, star, Context())
    assert edit.stats["worse"] > 0.5
    found = rates(glyphs, edit, star, tmp_path, images=4)
    print(edit.stats, found)
    assert found["keep"][0] > 0.9
    assert found["keep"][1] < found["keep"][0] - 0.3, found
    guarded = replace(step, cosine=0.98, worse=0.02).solve(glyphs, star, Context())
    assert guarded.stats["stopped"] == 2
    assert guarded.stats["worse"] <= 0.02


@pytest.mark.slow
def test_on_glyphs_what_is_trained_and_which_pictures_change_the_result(glyphs: Model, tmp_path: Path) -> None:
    """By how much ten steps without rules raise the error on other pictures of the concept. That feed-forward layers do
    more than attention, as the paper has it of CLIP, is not so in this encoder of four layers: 1.17 and 1.23."""
    star, heart = concepts.find("star"), concepts.find("heart")
    step = FewShot(steps=10, keep=0.0, ratio=0.0, cosine=0.0, worse=0.0)
    denoiser = Denoiser(glyphs, Context())
    latents = step.latents(denoiser, learned.texts(star, star.erase), 7)
    for number, picture_ in enumerate(denoiser.decode(step.latents(denoiser, learned.texts(heart, heart.erase), 8))):
        pixels = ((picture_.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    captions = learned.spread(learned.texts(star, star.erase), 16, 0)
    tries = {
        **{train: replace(step, train=train) for train in few_shot.PARTS}, "1": replace(step, images=1),
        "16": replace(step, images=16), "hearts": replace(step, folder=str(tmp_path)),
    }  # fmt: skip
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
