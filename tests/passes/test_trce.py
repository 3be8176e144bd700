"""TRCE. Stage 1: one map for all sites, its limits, and the place of the end token. Stage 2: what is trained, on which
rows and with which targets. On glyphs: both stages erase more than each alone."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import torch
from glyph_passes import tuned
from torch import Generator, Tensor

from erasec.base import Context, Pass
from erasec.closed_form.token_rows import find_spans, goal_prompts
from erasec.errors import ErasecError
from erasec.glyphs.judge import GlyphJudge
from erasec.model import loading
from erasec.model.view import Model
from erasec.passes.trce import Remap, Steer, Trce, hinge
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training import banks
from erasec.training.banks import Bank
from erasec.training.denoiser import Denoiser
from erasec.training.images import to_pixels

CONCEPT = Concept(
    name="star",
    erase=("star", "five-pointed spark"),
    anchor="circle",
    keep=("square", "ring"),
    templates=("{}", "a {}", "a photo of a {} at sunset/sunrise"),
)


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return loading.load(str(random_folder))


def ends(model: Model, concept: Concept) -> tuple[torch.Tensor, torch.Tensor]:
    """States (n, d) of the first end token of every erased prompt and of its counterpart, from the token ids alone."""
    rows = []
    for prompts in (concept.prompts(concept.phrases), goal_prompts(concept, concept.phrases)):
        texts = [prompt.text for prompt in prompts]
        ids = model._text_encoders.ids(texts, "text_encoder")
        states = model.encode(texts).states
        rows.append(states[torch.arange(len(texts)), ids.argmax(1)].double())
    return rows[0], rows[1]


def test_the_end_token_is_found_by_its_id_where_words_are_several_tokens(model: Model) -> None:
    """The reference takes the number of words plus one, which is another place as soon as a word splits."""
    prompts = CONCEPT.prompts(CONCEPT.phrases)
    places = find_spans(model, prompts, "context")[0].end
    ids = model._text_encoders.ids([prompt.text for prompt in prompts], "text_encoder")
    assert places == ids.argmax(1).tolist()
    assert any(place != len(prompt.text.split()) + 1 for place, prompt in zip(places, prompts, strict=True))


def test_every_site_is_multiplied_by_the_matrix_of_the_paper(model: Model) -> None:
    """W' = [mean W s e^T + eta W C][mean e e^T + eta C]^-1 site by site, with lam = 0 as in the paper, C the prior."""
    source, target = ends(model, CONCEPT)
    eta = 0.02
    edit = Remap(ridge=1e-9, keep=eta).solve(model, CONCEPT, Context())
    kept = model.encode(["", *(prompt.text for prompt in CONCEPT.prompts(CONCEPT.keep))]).states.flatten(0, 1).double()
    gram = kept.T @ kept / len(kept)
    matrix = source.T @ source / len(source) + eta * gram
    matrix = matrix + 1e-9 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    for site in model.streams["context"]:
        weight = model.stored_weight(site).double()
        left = weight @ (target.T @ source) / len(source) + weight @ (matrix - source.T @ source / len(source))
        wanted = left @ torch.linalg.inv(matrix)
        result = weight + edit.deltas[site].change(weight)
        assert float((result - wanted).norm() / (wanted - weight).norm()) < 1e-5
    assert len({id(delta) for delta in edit.deltas.values()}) == 1


def test_few_pairs_and_a_weak_prior_meet_their_targets_and_a_strong_prior_holds(model: Model) -> None:
    source, target = ends(model, CONCEPT)
    weak, strong = (Remap(keep=keep, ridge=1e-9).solve(model, CONCEPT, Context()) for keep in (1e-9, 1e9))
    for site in model.streams["context"]:
        weight = model.stored_weight(site).double()
        wanted = weight @ target.T
        moved = (weight + weak.deltas[site].change(weight)) @ source.T
        assert float((moved - wanted).norm() / wanted.norm()) < 0.05
        assert float((weight @ source.T - wanted).norm() / wanted.norm()) > 0.05
        assert float(strong.deltas[site].change(weight).norm() / weight.norm()) < 1e-3


def test_only_the_end_tokens_are_remapped(model: Model) -> None:
    edit = Remap().solve(model, CONCEPT, Context())
    assert len(edit.sums["star"]["context.source"]) == len(CONCEPT.prompts(CONCEPT.phrases))


QUICK: dict[str, Any] = {"steps": 2, "batch": 2, "trajectories": 2, "sample_steps": 4, "margin": 10.0}


def test_the_hinge_pushes_one_way_until_it_is_satisfied_and_then_not_at_all() -> None:
    rng = torch.Generator().manual_seed(0)
    safe, unsafe = (torch.randn(3, 4, 8, 8, generator=rng) for _ in range(2))
    for start in (torch.randn(3, 4, 8, 8, generator=rng), unsafe + 2 * torch.randn(3, 4, 8, 8, generator=rng)):
        prediction = start.requires_grad_()
        (gradient,) = torch.autograd.grad(
            hinge(prediction - safe, prediction - unsafe, 0.5, 100.0), prediction
        )  # a margin that no row meets
        assert torch.allclose(gradient, -2 * 0.5 * (safe - unsafe) / prediction.numel(), atol=1e-7)
    prediction = torch.stack([safe[0], unsafe[1], safe[2]]).requires_grad_()
    loss = hinge(prediction - safe, prediction - unsafe, 1.0, 0.01)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert [float(row.abs().max()) > 0 for row in gradient] == [False, True, False]
    assert torch.isclose(loss, ((unsafe[1] - safe[1]).square().mean() + 0.01) / 3)


def test_differences_are_of_noise_for_models_that_predict_v_too(tmp_path: Path, model: Model) -> None:
    random_models.random_folder(tmp_path, "sd2", "tiny")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 8}))
    denoiser = Denoiser(loading.load(str(tmp_path)), Context())
    assert denoiser.v_prediction
    latents, one, two = (torch.randn(2, *denoiser.shape, generator=Generator().manual_seed(seed)) for seed in range(3))
    times = torch.tensor([901, 40])
    alpha = denoiser.alphas[times].view(-1, 1, 1, 1)
    clean = [(latents - (1 - alpha).sqrt() * noise) / alpha.sqrt() for noise in (one, two)]
    first, second = (denoiser.target(x, noise, times) for x, noise in zip(clean, (one, two), strict=True))
    assert torch.allclose(denoiser.as_noise(first - second, times), one - two, atol=1e-3)
    assert not torch.allclose(first - second, one - two, atol=1e-3)
    assert torch.equal(Denoiser(model, Context()).as_noise(one - two, times), one - two)
    edit = tuned(Steer, **QUICK).solve(denoiser.model, CONCEPT, Context())
    assert all(bool(delta.change(torch.zeros(site.shape)).isfinite().all()) for site, delta in edit.deltas.items())


def test_all_of_self_attention_is_trained_and_the_queries_of_the_text(model: Model) -> None:
    own = {site.key for site in model.parameters if ".attn1." in site.key}
    assert any(key.endswith("attn1.to_out.0.bias") for key in own)
    queries = {site.key for site in model.parameters if ".attn2.to_q." in site.key}
    assert {site.key for site in tuned(Steer).sites(model)} == own | queries
    both = tuned(Trce).sites(model)
    assert len(both) == len(set(both))
    assert set(both) == {*tuned(Steer).sites(model), *Remap().sites(model)}
    edit = tuned(Steer, **QUICK).solve(model, CONCEPT, Context())
    moved = {site.key for site, delta in edit.deltas.items() if float(delta.change(torch.zeros(site.shape)).norm()) > 0}
    assert moved == own | queries


def test_targets_are_the_guided_predictions_for_the_goal_and_the_concept(model: Model) -> None:
    concept = CONCEPT.model_copy(update={"counterparts": (("five-pointed spark", "round dot"),)})
    goal = {"a star": "a circle", "a five-pointed spark": "a round dot"}
    step, denoiser = (
        tuned(Steer, push=2.5, trajectories=6, sample_steps=4, early_fraction=0.5),
        Denoiser(model, Context()),
    )
    shown, safe, unsafe = step._targets(denoiser, concept, 3)
    assert shown.timesteps.tolist() == denoiser.sample(["a star"], [1], 4, 1.0).timesteps[:2].tolist() * 6
    rows = [row for row, text in enumerate(shown.texts(torch.arange(12))) if text in goal]
    assert {text for text in shown.prompts if text in goal} == goal.keys()
    for row in rows:
        at = shown.latents[[row]], shown.timesteps[[row]]
        (text,) = shown.texts(torch.tensor([row]))
        with torch.no_grad():
            bad, good, empty = (denoiser.predict(*at, denoiser.states([prompt])) for prompt in (text, goal[text], ""))
        assert torch.allclose(safe[[row]], good + 2.5 * (good - empty), atol=1e-4)
        assert torch.allclose(unsafe[[row]], bad + 2.5 * (bad - empty), atol=1e-4)
        assert not torch.allclose(safe[[row]], unsafe[[row]], atol=1e-4)


def test_latents_belong_to_their_timesteps_and_only_in_the_reference_to_those_before(model: Model) -> None:
    denoiser, prompts = Denoiser(model, Context()), ["a star", "a ring"]
    trajectories = denoiser.sample(prompts, banks.training_seeds(5, 2), 4, 3.0)
    for reference, shift in ((False, 0), (True, 1)):
        bank = tuned(Steer, sample_steps=4, reference=reference)._sample(denoiser, prompts, 5, 3.0, slice(0, 2))
        assert bank.timesteps.tolist() == trajectories.timesteps[:2].tolist() * 2
        assert torch.allclose(bank.latents, trajectories.latents[:, shift : shift + 2].flatten(0, 1), atol=1e-5)
        with torch.no_grad():
            prediction = denoiser.predict(bank.latents[[3]], bank.timesteps[[3]], denoiser.states(["a ring"]))
        assert torch.allclose(bank.predictions[[3]], prediction, atol=1e-5)


def test_pairs_are_shuffled_and_only_in_the_reference_in_the_order_of_the_prompts(model: Model) -> None:
    concept, denoiser = CONCEPT.model_copy(update={"templates": ("a {}",)}), Denoiser(model, Context())
    for reference in (False, True):
        step = tuned(Steer, trajectories=6, sample_steps=4, early_fraction=0.5, batch=2, reference=reference)
        shown = step._targets(denoiser, concept, 1)[0]
        drawn = [step._draw(shown, Generator().manual_seed(number), number) for number in range(3)]
        order = [row // 2 for part in drawn for row in part.tolist()]
        assert (list(shown.prompts) == ["a star"] * 3 + ["a five-pointed spark"] * 3) == reference
        assert (order == [0, 1, 2, 3, 4, 5]) == reference


class Accumulating(Steer):
    """The reference with the right pairs and a random order: only its gradients still add up."""

    def _sample(self, *given: Any) -> Bank:
        return tuned(Steer, sample_steps=self.sample_steps)._sample(*given)

    def _draw(self, shown: Bank, rng: Generator, step: int) -> Tensor:
        return shown.draw(self.batch, rng)


def test_gradients_start_from_zero_at_every_step_and_only_in_the_reference_add_up(model: Model) -> None:
    concept = Concept(name="star", erase=("star",), anchor="circle", keep=("ring",), templates=("a {}",))

    def same(steps: int) -> bool:
        own, sums = (
            tuned(Accumulating, **{**QUICK, "steps": steps, "reference": given}).solve(model, concept, Context()).deltas
            for given in (False, True)
        )
        return all(torch.equal(vars(own[site])["value"], vars(sums[site])["value"]) for site in own)

    assert same(1)
    assert not same(3)


class Watched(Steer):
    """Records the edits of the original network, and whether it is released when the training begins."""

    def _targets(self, original: Denoiser, *given: Any) -> tuple[Bank, Tensor, Tensor]:
        seen.append(original.model.edits)
        there.append(weakref.ref(original.unet))
        return super()._targets(original, *given)

    def fit(self, *given: Any, **more: Any) -> Any:
        seen.append(there[-1]() is None)
        return super().fit(*given, **more)


seen: list[Any] = []
there: list[weakref.ref[Any]] = []


def test_targets_are_the_original_s_while_it_starts_from_and_is_held_to_the_model_as_given(model: Model) -> None:
    given = model.with_edit(Remap().solve(model, CONCEPT, Context()))
    seen.clear()
    edit = tuned(Watched, **QUICK).solve(given, CONCEPT, Context())
    assert seen == [(), True]  # never two networks at once
    assert edit.curves["loss preserve"][0] + edit.curves["loss keep"][0] < 1e-8
    assert edit.curves["loss preserve"][1] > 1e-8
    own, base = tuned(Steer, **QUICK), tuned(Steer, **QUICK).solve(model, CONCEPT, Context())
    assert edit.curves["loss erase"][0] != base.curves["loss erase"][0]
    for edited, site in ((given.original, model.streams["context"][0]), (model.original, model.sites[0])):
        assert torch.equal(edited.weight(site), model.weight(site))
    assert not torch.equal(given.weight(site := model.streams["context"][0]), model.weight(site))
    one, two = (own._targets(Denoiser(m.original, Context()), CONCEPT, 0)[1] for m in (given, model))
    assert torch.equal(one, two)


def test_both_stages_are_stage_1_and_then_stage_2_on_its_result(model: Model) -> None:
    first = Remap(scale=0.5).solve(model, CONCEPT, Context())
    second = tuned(Steer, **QUICK).solve(model.with_edit(first), CONCEPT, Context())
    both = tuned(Trce, **QUICK, remap_scale=0.5).solve(model, CONCEPT, Context())
    assert both.by == "trce"
    assert both.deltas.keys() == {*first.deltas, *second.deltas}
    apart, joined = model.with_edit(first).with_edit(second), model.with_edit(both)
    assert all(torch.equal(apart.weight(site), joined.weight(site)) for site in both.deltas)
    assert any(
        not torch.equal(
            model.with_edit(tuned(Trce, **QUICK).solve(model, CONCEPT, Context())).weight(site), joined.weight(site)
        )
        for site in first.deltas
    )


def test_a_rank_leaves_the_bias_and_counts_what_it_trains(model: Model) -> None:
    edit = tuned(Trce, **QUICK, rank=2).solve(model, CONCEPT, Context())
    assert {site.key for site in edit.deltas} == {s.key for s in tuned(Trce).sites(model) if len(s.shape) == 2}
    assert 0 < edit.stats["parameters"] < sum(site.shape[0] * site.shape[-1] for site in edit.deltas)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_fraction": 0.0}, "early_fraction is 0.0"),
        ({"early_fraction": 1.5}, "early_fraction is 1.5"),
        ({"sample_steps": 0}, "sample_steps is 0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"preserve": -1.0}, "preserve is -1.0"),
        ({"push": -0.5}, "push is -0.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasecError, match=f"trce.steer: option {message}"):
        tuned(Steer, **options)
    with pytest.raises(ErasecError, match=f"trce: option {message}"):
        tuned(Trce, **options)


def test_a_concept_that_becomes_itself_is_refused(model: Model) -> None:
    with pytest.raises(ErasecError, match="star becomes itself") as caught:
        tuned(Steer, **QUICK).solve(model, Concept(name="star", erase=("star",), anchor="star"), Context())
    assert "another anchor" in caught.value.fix


def test_a_concept_without_a_goal_becomes_the_empty_prompt(model: Model) -> None:
    concept = Concept(name="star", erase=("star",), templates=("a {}",))
    shown, safe, _ = tuned(Steer, **QUICK)._targets(Denoiser(model, Context()), concept, 0)
    assert torch.allclose(safe, shown.unconditional, atol=1e-4)


class Late(Steer):
    """Steers the steps that the method leaves alone."""

    def part(self) -> slice:
        return slice(super().part().stop, None)


class Glyphs:
    """Glyphs and the bare word star: nothing that a pass is shown speaks of synonyms, other contexts or night skies."""

    def __init__(self) -> None:
        self.model, self.judge, star = loading.load("glyphs"), GlyphJudge(), concepts.find("star", "glyphs")
        self.concept = star.model_copy(update={"synonyms": (), "templates": ("{}",)})
        panel = self.judge.panel(star, 24, 21)
        self.made: dict[tuple[Pass, ...], Model] = {}
        self.questions = {
            group: [each for each in panel if each.group == group][:: 3 if group == "keep" else 1]
            for group in ("name", "synonym", "implicit", "keep")
        }

    def edited_model(self, *steps: Pass) -> Model:
        if steps and steps not in self.made:
            before = self.edited_model(*steps[:-1])
            self.made[steps] = before.with_edit(steps[-1].solve(before, self.concept, Context()))
        return self.made[steps] if steps else self.model

    def hit_rate(self, view: Model, *groups: str) -> float:
        """The share of pictures that show what their prompts name, of prompts of these groups."""
        questions = [each for group in groups for each in self.questions[group]]
        denoiser = Denoiser(view, Context())
        final = denoiser.sample(
            [question.prompt for question in questions], [question.seed for question in questions], 15, 4.0
        ).final
        return float(
            np.mean(self.judge.sees(to_pixels(denoiser.decode(final)), [question.looked_for for question in questions]))
        )

    def unconditional_change(self, view: Model, since: Model) -> float:
        """Mean squared change of unconditional predictions since ``since``, relative to their mean square."""
        bank = banks.sample_bank(Denoiser(since, Context()), [""] * 16, 77, 10, 1.0)
        return float(
            (banks.predict_bank(Denoiser(view, Context()), bank) - bank.predictions).square().mean()
            / bank.predictions.square().mean()
        )


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return Glyphs()


@pytest.mark.slow
def test_both_stages_erase_more_than_the_first_and_that_more_than_the_second_and_the_rest_stays(glyphs: Glyphs) -> None:
    gone = ("name", "synonym", "implicit")
    first, second, both = (
        glyphs.edited_model(Remap()),
        glyphs.edited_model(tuned(Steer)),
        glyphs.edited_model(tuned(Trce)),
    )
    one, two, three = (glyphs.hit_rate(view, *gone) for view in (first, second, both))
    kept = [glyphs.hit_rate(view, "keep") for view in (glyphs.model, first, both)]
    moved, implicit = (
        glyphs.unconditional_change(both, first),
        [glyphs.hit_rate(view, "implicit") for view in (first, second, both)],
    )
    print(f"\nshown: stage 1 {one:.3f}, stage 2 {two:.3f}, both {three:.3f}; implicit {implicit}")
    print(f"kept: before {kept[0]:.3f}, stage 1 {kept[1]:.3f}, both {kept[2]:.3f}; no prompt moved by {moved:.4f}")
    assert three < one < two
    assert three <= 0.1
    assert implicit[2] <= 0.1
    assert kept[2] >= kept[0] - 0.1
    assert moved <= 0.02


@pytest.mark.slow
def test_late_steps_move_the_rest_too_far(glyphs: Glyphs) -> None:
    """By the paper, late steps erase less. On glyphs they erase more, and change unconditional predictions three times
    as much, by more than 2 %: late predictions hardly depend on the text, so that the margin is not met."""
    views = [glyphs.edited_model(step) for step in (tuned(Steer), tuned(Late))]
    shown = [glyphs.hit_rate(view, "name", "synonym", "implicit") for view in views]
    moved = [glyphs.unconditional_change(view, glyphs.model) for view in views]
    print(f"\nshown and moved: early steps {shown[0]:.3f} {moved[0]:.4f}, late steps {shown[1]:.3f} {moved[1]:.4f}")
    assert moved[0] <= 0.02 < moved[1]
    assert max(shown) < 0.5 < glyphs.hit_rate(glyphs.model, "name", "synonym", "implicit")


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="not so on glyphs: late steps erase more")
def test_late_steps_erase_less(glyphs: Glyphs) -> None:
    early, late = (
        glyphs.hit_rate(glyphs.edited_model(step), "name", "synonym", "implicit")
        for step in (tuned(Steer), tuned(Late))
    )
    assert late > early


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="not so on glyphs: the preserving losses hold a model without the hinge as well")
def test_without_the_hinge_alone_it_runs_away(glyphs: Glyphs) -> None:
    first = glyphs.edited_model(Remap())
    held, endless = (
        glyphs.edited_model(Remap(), tuned(Steer, steps=60, margin=margin)) for margin in (tuned(Steer).margin, 1e6)
    )
    assert glyphs.unconditional_change(endless, first) > 2 * glyphs.unconditional_change(held, first)


@pytest.mark.slow
def test_without_the_preserving_losses_and_more_so_without_the_hinge_it_runs_away(glyphs: Glyphs) -> None:
    """The preserving losses hold a model without the hinge as well, so that it is left out where they are."""
    first, alone = glyphs.edited_model(Remap()), {"preserve": 0.0, "keep": 0.0}
    views = [
        glyphs.edited_model(Remap(), step)
        for step in (tuned(Steer), tuned(Steer, **alone), tuned(Steer, **alone, margin=1e6))
    ]
    moved, kept = (
        [glyphs.unconditional_change(view, first) for view in views],
        [glyphs.hit_rate(view, "keep") for view in views],
    )
    print(f"\nno prompt moved by {moved}, kept {kept}: as it is, without the preserving losses, nor the hinge")
    assert moved[1] > 2 * moved[0]
    assert moved[2] > 2 * moved[1]
    assert kept[2] < kept[0] - 0.1
