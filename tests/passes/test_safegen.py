"""SafeGen: self-attention alone, no text, targets that stand for the mosaic; on glyphs how far a star fades."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from glyph_passes import tuned
from PIL import Image
from torch import Tensor

from erasec.base import Context, Question
from erasec.errors import ErasecError
from erasec.family import Site
from erasec.glyphs.judge import GlyphJudge
from erasec.model import loading
from erasec.model.edit import Edit, LowRank
from erasec.model.view import Model
from erasec.passes.safegen import SafeGen, censored_target, target_scale
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training.base import trainable
from erasec.training.denoiser import Denoiser
from erasec.training.images import to_pixels
from erasec.training.triplets import generate_triplets

CONCEPT = Concept(name="star", erase=("star",), keep=("square",))
TARGETS = get_args(get_type_hints(SafeGen)["target"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two triplets of noise; half of each censored image is gray."""
    root, rng = tmp_path_factory.mktemp("triplets"), np.random.default_rng(0)
    for part in ("concept", "censored", "benign"):
        (root / part).mkdir()
    for number in range(2):
        image, other = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "concept" / f"{number}.png")
        Image.fromarray(other).save(root / "benign" / f"{number}.png")
        image[:, :32] = 128
        Image.fromarray(image).save(root / "censored" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def v_base(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same weights, with a config that says that they predict v."""
    copy = tmp_path_factory.mktemp("v") / "model"
    shutil.copytree(random_folder, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return loading.load(str(copy))


def small(folder: Path, **options: float | str) -> SafeGen:
    return replace(tuned(SafeGen, steps=2, batch=2, triplets=str(folder)), **options)  # type: ignore[arg-type]


def largest(base: Model, edit: Edit) -> float:
    return max(float(delta.change(base.stored_weight(site)).abs().max()) for site, delta in edit.deltas.items())


def test_self_attention_moves_and_nothing_else(base: Model, folder: Path) -> None:
    """Every tensor named attn1 trains, weights and biases."""
    step = small(folder)
    wanted = {key for key in base.entries("unet") if ".attn1." in key}
    assert any(key.endswith("to_out.0.bias") for key in wanted)
    assert {(site.component, site.key) for site in step.sites(base)} == {("unet", key) for key in wanted}
    edit = step.solve(base, CONCEPT, Context())
    assert edit.deltas.keys() == set(step.sites(base))
    assert largest(base, edit) > 0


def test_the_text_is_empty_throughout(base: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as images, each the text states of the empty prompt."""
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(base.source.root / "tokenizer")([""], padding="max_length")["input_ids"]
    assert torch.equal(base._text_encoders.ids([""], "text_encoder"), torch.tensor(ids))
    calls: list[Tensor] = []
    predict = Denoiser.predict

    def record(self: Denoiser, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        calls.append(states.detach())
        return predict(self, latents, times, states)

    monkeypatch.setattr(Denoiser, "predict", record)
    small(folder, batch=3).solve(base, CONCEPT, Context())
    empty, star = base.encode([""]).states, base.encode(["star"]).states
    assert len(calls) == 6  # two steps of: concept, the teacher on benign images, the student on benign images
    assert all(torch.equal(states, empty.expand(3, -1, -1)) for states in calls)
    assert not torch.equal(empty, star)


def estimate(denoiser: Denoiser, latents: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
    """The clean latents that a prediction stands for."""
    alpha = denoiser.alphas[times].double().view(-1, 1, 1, 1)
    if denoiser.v_prediction:
        return alpha.sqrt() * latents - (1 - alpha).sqrt() * prediction
    return (latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt()


@pytest.mark.parametrize("kind", ["base", "v_base"])
def test_the_exact_target_means_the_censored_image_at_every_timestep(kind: str, request: pytest.FixtureRequest) -> None:
    """For networks that predict noise and for those that predict v."""
    denoiser = Denoiser(request.getfixturevalue(kind), Context())
    assert denoiser.v_prediction == (kind == "v_base")
    times = torch.arange(0, 1000, 7)
    schedule = denoiser.schedule
    schedule.alphas = schedule.alphas.double()  # type: ignore[union-attr]  # the identity is to 1e-5, and 1 / sqrt(alpha) reaches 15
    rng = torch.Generator().manual_seed(0)
    shown, hidden, noise = torch.randn(3, len(times), 4, 8, 8, generator=rng, dtype=torch.float64)
    latents = denoiser.add_noise(shown, noise, times)
    off = {}
    for target in TARGETS:
        a = target_scale(schedule.picture_ratio()[times], target, 1.0)
        prediction = censored_target(denoiser, shown, hidden, noise, times, a)
        off[target] = (estimate(denoiser, latents, prediction, times) - hidden).abs().amax((1, 2, 3))
    assert off["exact"].max() < 1e-5
    ratio = target_scale(schedule.picture_ratio()[times], "exact", 1.0)
    near = (ratio - 1).abs() < 0.02
    assert bool(near.any())
    assert off["constant"][near].max() < 0.2
    assert off["constant"][~near].min() > off["constant"][near].min()
    assert off["constant"][[0, -1]].min() > 0.25
    assert off["clipped"][ratio <= 1].max() < 1e-5
    assert off["clipped"][ratio > 1.1].min() > 0.01


def test_the_pull_of_every_target_on_the_schedule_of_stable_diffusion(base: Model) -> None:
    ratios = Denoiser(base, Context()).schedule.picture_ratio()
    at = torch.tensor([0, 100, 354, 999])
    exact = target_scale(ratios, "exact", 2.0)[at]
    torch.testing.assert_close(exact, torch.tensor([34.3, 2.91, 1.00, 0.068]), rtol=0.01, atol=0.0)
    torch.testing.assert_close(target_scale(ratios, "clipped", 2.0)[at], exact.clamp(max=2.0))
    assert target_scale(ratios, "constant", 2.0).unique().tolist() == [1.0]


@pytest.mark.parametrize("kind", ["base", "v_base"])
def test_it_learns_its_target(kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(kind)
    trained = small(folder, steps=10, lr=1e-2, keep=0.1).solve(base, CONCEPT, Context()).curves["loss erase"]
    still = small(folder, steps=10, lr=1e-9, keep=0.1).solve(base, CONCEPT, Context()).curves["loss erase"]
    assert np.mean(trained[-5:]) < 0.95 * np.mean(still[-5:])  # the same draws, untrained


def test_without_the_mosaic_nothing_moves_and_without_keeping_the_benign_do(base: Model, folder: Path) -> None:
    """With erase = 0 the only loss is that which keeps the predictions, and it is zero."""
    assert largest(base, small(folder, erase=0.0).solve(base, CONCEPT, Context())) == 0
    moved = {}
    for keep in (30.0, 1e-6):
        edit = small(folder, steps=12, lr=2e-3, keep=keep).solve(base, CONCEPT, Context())
        moved[keep] = np.mean(edit.curves["loss keep"][-4:]) / keep
    assert moved[30.0] < 0.6 * moved[1e-6]
    assert "loss keep" not in small(folder, keep=0.0).solve(base, CONCEPT, Context()).curves


def test_targets_differ_in_what_they_teach(base: Model, folder: Path) -> None:
    edits = [small(folder, target=target, max_pull=1.0).solve(base, CONCEPT, Context()) for target in TARGETS]
    losses = [edit.curves["loss erase"][0] for edit in edits]
    assert len(set(losses)) == 3
    same = small(folder, target="clipped", max_pull=100.0).solve(base, CONCEPT, Context())
    assert same.curves["loss erase"] == edits[TARGETS.index("exact")].curves["loss erase"]  # nothing is left to clip


def test_the_same_seed_gives_the_same_edit_and_the_average_another(base: Model, folder: Path) -> None:
    def change(edit: Edit, site: Site) -> Tensor:
        return edit.deltas[site].change(base.stored_weight(site))

    step = small(folder, lr=1e-3)
    one, two, other = (step.solve(base, CONCEPT, Context(seed=seed)) for seed in (4, 4, 5))
    mean = replace(step, ema=0.9).solve(base, CONCEPT, Context(seed=4))
    assert all(torch.equal(change(one, site), change(two, site)) for site in one.deltas)
    assert not all(torch.equal(change(one, site), change(other, site)) for site in one.deltas)
    assert not all(torch.equal(change(one, site), change(mean, site)) for site in one.deltas)


def test_a_rank_leaves_out_the_biases(base: Model, folder: Path) -> None:
    edit = small(folder, rank=2).solve(base, CONCEPT, Context())
    assert all(isinstance(delta, LowRank) and delta.rank == 2 for delta in edit.deltas.values())
    assert {site.key for site in edit.deltas} == {s.key for s in tuned(SafeGen).sites(base) if len(s.shape) == 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "clippd"}, ("target is 'clippd'", "clipped")),
        ({"images": 0}, ("images is 0", "at least 1")),
        ({"mosaic_cells": 0}, ("mosaic_cells is 0", "at least 1")),
        ({"sample_steps": 0}, ("sample_steps is 0", "at least 1")),
        ({"erase": -1.0}, ("erase is -1.0", "at least 0")),
        ({"keep": -1.0}, ("keep is -1.0", "at least 0")),
        ({"max_pull": 0.0}, ("max_pull is 0.0", "above 0")),
        ({"ema": 1.0}, ("ema is 1.0", "below 1")),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, float | str], words: tuple[str, ...]) -> None:
    with pytest.raises(ErasecError) as caught:
        tuned(SafeGen, **options)  # type: ignore[arg-type]
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_folder_with_a_missing_file_and_a_model_without_a_judge_are_errors(base: Model, tmp_path: Path) -> None:
    (tmp_path / "triplets.csv").write_text("concept,censored,benign\na.png,b.png,c.png\n")
    with pytest.raises(ErasecError, match=r"there is no image a\.png"):
        small(tmp_path).solve(base, CONCEPT, Context())
    with pytest.raises(ErasecError, match="no boxes to censor star"):
        tuned(SafeGen, steps=2).solve(base, CONCEPT, Context())


STAR = concepts.find("star", "glyphs")


class Crossed(SafeGen):
    """An ablation: cross-attention in place of self-attention."""

    def sites(self, model: Model) -> tuple[Site, ...]:
        return trainable(model, lambda site: site.attn == "cross")


@pytest.fixture(scope="module")
def glyphs() -> Model:
    return loading.load("glyphs")


@pytest.fixture(scope="module")
def solved(glyphs: Model) -> Edit:
    return tuned(SafeGen).solve(glyphs, STAR, Context())


@pytest.fixture(scope="module")
def questions(glyphs: Model) -> dict[str, list[Question]]:
    """By group: what names a star, what shows one unnamed, "states" that no text has, and what stays."""
    panel = GlyphJudge("b").panel(STAR, 12, seed=7)
    questions = {
        name: [question for question in panel if question.group == name] for name in ("name", "implicit", "keep")
    }
    questions["keep"] = questions["keep"][:45]  # five of each shape
    questions["states"] = [Question("states", f"states {number}", 7000 + number, "star") for number in range(16)]
    return questions


def rates(model: Model, questions: dict[str, list[Question]]) -> dict[str, float]:
    """How often judge B sees the label of each group."""
    rng, star = torch.Generator().manual_seed(7), loading.load("glyphs").encode(["a star", "a blue star"]).states
    denoiser = Denoiser(model, Context())
    for number, question in enumerate(questions["states"]):
        # Noise of 0.7 of the states' own deviation on every row: no text encoder says this, yet the base draws a star.
        noise = torch.randn(star[0].shape, generator=rng)
        denoiser._states[question.prompt] = star[number % 2] + 0.7 * star.std() * noise
    every = [question for group in questions.values() for question in group]
    trajectories = denoiser.sample(
        [question.prompt for question in every], [question.seed for question in every], 15, 4.0, batch=64
    )
    pixels = to_pixels(denoiser.decode(trajectories.final))
    seen = GlyphJudge("b").sees(pixels, [question.looked_for for question in every])
    groups = np.array([group for group, members in questions.items() for _ in members])
    return {group: float(seen[groups == group].mean()) for group in questions}


@pytest.fixture(scope="module")
def shown(glyphs: Model, solved: Edit, questions: dict[str, list[Question]]) -> dict[str, dict[str, float]]:
    """``rates`` of the base, of the edit, and of the ablation."""
    crossed = tuned(Crossed).solve(glyphs, STAR, Context())
    views = {"base": glyphs, "own": glyphs.with_edit(solved), "crossed": glyphs.with_edit(crossed)}
    return {name: rates(view, questions) for name, view in views.items()}


@pytest.mark.slow
def test_the_concept_fades_by_name_and_without_a_text_and_the_rest_stays(shown: dict[str, dict[str, float]]) -> None:
    """To a weaker limit than the 0.15 of the next but one."""
    before, after = shown["base"], shown["own"]
    assert min(before.values()) > 0.9
    for group in ("name", "states"):
        assert after[group] <= 0.6 * before[group], group
    assert after["implicit"] < before["implicit"]
    assert after["keep"] >= before["keep"] - 0.1


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="not reached on glyphs: two thirds of what is implied are left")
def test_what_is_implied_fades_as_well(shown: dict[str, dict[str, float]]) -> None:
    assert shown["own"]["implicit"] <= 0.6 * shown["base"]["implicit"]


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="not reached on glyphs: 0.58 is left by name, 0.67 implied, 0.38 without a text")
def test_at_most_15_percent_are_left_whatever_the_text(shown: dict[str, dict[str, float]]) -> None:
    assert all(shown["own"][group] <= 0.15 * shown["base"][group] for group in ("name", "implicit", "states"))


@pytest.mark.slow
def test_in_cross_attention_the_same_training_leaves_what_is_implied(shown: dict[str, dict[str, float]]) -> None:
    """Cross-attention erases more of the prompts that name a star, and nothing of those that imply it."""
    assert shown["crossed"]["name"] < shown["own"]["name"]
    assert shown["crossed"]["implicit"] > shown["own"]["implicit"] + 0.2


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="not so on glyphs: of names, which it never saw either, it leaves less")
def test_in_cross_attention_the_same_training_is_weaker_on_text_that_it_never_saw(
    shown: dict[str, dict[str, float]],
) -> None:
    """What cross-attention learns with the empty prompt would hold less with any other prompt."""
    unseen = ("name", "implicit", "states")
    assert sum(shown["crossed"][group] for group in unseen) > sum(shown["own"][group] for group in unseen) + 0.5


@pytest.fixture(scope="module")
def errors(glyphs: Model, solved: Edit) -> dict[str, float]:
    """Mean square distance, after over before, of the network's estimate from the mosaics and from benign images, at
    timestep 200 of images that it was not trained on."""
    images = generate_triplets(Denoiser(glyphs, Context(seed=9)), STAR, 16, 12, 4.0, 2)
    distances: dict[str, list[float]] = {"concept": [], "benign": []}
    for model in (glyphs, glyphs.with_edit(solved)):
        denoiser = Denoiser(model, Context())
        shown, hidden, benign = (denoiser.encode(part) for part in (images.concept, images.censored, images.benign))
        for kind, clean, wanted in (("concept", shown, hidden), ("benign", benign, benign)):
            times = torch.full((len(clean),), 200)
            latents = denoiser.add_noise(
                clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)), times
            )
            with torch.no_grad():
                prediction = denoiser.predict(latents, times, denoiser.states([""] * len(clean)))
            distances[kind].append(float((estimate(denoiser, latents, prediction, times) - wanted).square().mean()))
    return {kind: after / before for kind, (before, after) in distances.items()}


@pytest.mark.slow
def test_what_the_network_sees_in_an_image_of_the_concept_is_nearer_to_the_mosaic(errors: dict[str, float]) -> None:
    assert errors["concept"] < 0.6


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="not reached on glyphs: the error at timestep 200 about doubles")
def test_of_benign_images_the_error_grows_by_a_twentieth_at_most(errors: dict[str, float]) -> None:
    assert errors["benign"] <= 1.05
