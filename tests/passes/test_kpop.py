"""KPOP: which attentions read the key, the losses with and without it, and that no other key recovers the concept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from glyph_passes import tuned
from random_models import random_pipeline
from torch import Tensor

from erasec import registry
from erasec.attention.pipeline import Sampling, generate
from erasec.attention.processors import attach, attached_rows
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.keys.key_file import fold_secret
from erasec.model import loading
from erasec.model.edit import Edit
from erasec.model.memory import Secret
from erasec.model.sidecar import Extras, write_extras
from erasec.model.view import Model
from erasec.passes.kpop import Batch, Kpop, random_rows_like
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training import banks
from erasec.training import denoiser as denoiser_module
from erasec.training.denoiser import Denoiser
from erasec.training.loop import step_rng

CONCEPT = Concept(name="star", erase=("star",), keep=("square",), templates=("a {}",))


def small(**options: Any) -> Kpop:
    return tuned(Kpop, **{"steps": 2, "trajectories": 2, "sample_steps": 3, "batch": 2, **options})


def change(edit: Edit) -> Tensor:
    """All changes of an edit in one row."""
    return torch.cat([delta.change(torch.zeros(site.shape)).flatten() for site, delta in edit.deltas.items()])


def gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def test_the_trained_tensors_are_those_of_the_published_runs(base: Model) -> None:
    every = set(base.entries("unet"))
    cross = {site.key for site in tuned(Kpop, train="x").sites(base)}
    assert cross == {key for key in every if ".attn2." in key}
    assert {key.split(".attn2.")[1].split(".")[0] for key in cross} == {"to_q", "to_k", "to_v", "to_out"}
    rest = {site.key for site in tuned(Kpop, train="noxattn").sites(base)}
    heads = {key for key in every if key.split(".")[0] in ("conv_out", "conv_norm_out", "time_embedding")}
    assert heads
    assert rest == every - cross - heads


def test_modes_select_the_middle_block_the_decoder_as_well_or_all(base: Model) -> None:
    attentions = {mode: tuned(Kpop, mode=mode).attentions(base) for mode in ("mid", "midout", "all")}
    blocks = {mode: {name.split("_")[0] for name in names} for mode, names in attentions.items()}
    assert blocks == {"mid": {"mid"}, "midout": {"mid", "up"}, "all": {"down", "mid", "up"}}
    assert [len(attentions[mode]) for mode in ("mid", "midout", "all")] == [1, 5, 7]
    assert all(name.endswith(".attn2") for name in attentions["all"])


def test_a_model_without_a_middle_block_needs_another_mode(base: Model) -> None:
    headless = replace(base)
    headless.__dict__["parameters"] = tuple(s for s in base.parameters if not s.key.startswith("mid_block."))
    with pytest.raises(ErasecError, match="mode 'mid'") as caught:
        tuned(Kpop, mode="mid").attentions(headless)
    assert "all" in caught.value.fix
    assert len(tuned(Kpop, mode="all").attentions(headless)) == 6


def test_a_key_starts_as_states_of_the_concept_or_as_noise_of_their_size(base: Model) -> None:
    tokens = base.encode(["a star"])
    own = tokens.states[0, tokens.last[0]]
    near = tuned(Kpop, init="concept", key_rows=3).start(base, CONCEPT, 0)
    far = tuned(Kpop, init="random", key_rows=3).start(base, CONCEPT, 0)
    assert all(rows.shape == (3, len(own)) for rows in (*near, *far))
    assert all(0.05 < gap(row, own) < 0.2 for rows in near for row in rows)
    assert all(gap(row, own) > 1 for rows in far for row in rows)
    assert 0.8 < float(far[0].norm() / near[0].norm()) < 1.25
    again, other = (tuned(Kpop, init="random", key_rows=3).start(base, CONCEPT, seed) for seed in (0, 1))
    assert torch.equal(again[0], far[0])
    assert gap(other[0], far[0]) > 1
    assert gap(far[0], far[1]) > 1


def test_concepts_start_with_keys_of_their_own(base: Model) -> None:
    """Keys that start alike open one another's concepts."""
    star, heart = (tuned(Kpop).start(base, Concept(name=name, erase=(name,)), 0) for name in ("star", "heart"))
    likeness = torch.nn.functional.cosine_similarity(star[0], heart[0])
    assert float(likeness.abs().max()) < 0.5
    again = tuned(Kpop).start(base, Concept(name="star", erase=("star",)), 0)
    assert float(torch.nn.functional.cosine_similarity(star[0], again[0]).min()) > 0.999


def test_all_processes_start_from_one_key(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, seeds = [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        keys.append(tuned(Kpop).start(base, CONCEPT, 0))
        seeds.append(step_rng(0, 0).initial_seed())
    assert all(torch.equal(one, two) for one, two in zip(*keys, strict=True))
    assert seeds[0] != seeds[1]  # the draws of the losses differ between processes
    other = tuned(Kpop).start(base, CONCEPT.model_copy(update={"name": "pentagram"}), 0)
    assert gap(other[0], keys[0][0]) > 1 and gap(other[1], keys[0][1]) > 1


def test_random_rows_have_the_norms_of_the_key() -> None:
    rows = 3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    other = random_rows_like(rows, torch.Generator().manual_seed(2))
    assert torch.allclose(other.norm(dim=1), rows.norm(dim=1))
    assert float(torch.nn.functional.cosine_similarity(other, rows).abs().max()) < 0.6
    assert not torch.equal(other, random_rows_like(rows, torch.Generator().manual_seed(3)))


def test_the_key_is_trained_by_its_own_objective_and_else_stays(base: Model) -> None:
    step = small(key_rows=3, key_steps=0)
    keys, values = step.start(base, CONCEPT, 0)
    still, moved = (small(key_rows=3, key_steps=n).solve(base, CONCEPT, Context()).secret for n in (0, 2))
    assert still is not None
    assert moved is not None
    assert torch.equal(still.k_rows, keys)
    assert torch.equal(still.v_rows, values)
    # Adam at 1e-2, 2 x 2 updates: about 0.04 a coordinate at most.
    assert 0 < float((moved.v_rows - values).abs().max()) < 0.05
    assert (moved.concept, moved.attentions) == ("star", step.attentions(base))


def test_the_key_is_fitted_to_the_frozen_weights(base: Model) -> None:
    """The key's objective alone, on one latent: with frozen weights, predictions with the key approach the target."""
    alone: dict[str, Any] = {**ONE, "batch": 1, "recover": 0.0, "lr": 1e-12}
    edit = tuned(Kpop, **{**alone, "steps": 8, "key_lr": 3e-2, "key_steps": 1}).solve(base, CONCEPT, Context())
    losses = edit.curves["loss key"]
    assert losses[-1] < 0.8 * losses[0]
    assert float(change(edit).abs().max()) < 1e-9


def test_the_key_preserves_kept_prompts(base: Model) -> None:
    """With frozen weights, a key that is also fitted to kept prompts changes them less than one that is not."""
    more: dict[str, Any] = {**ONE, "batch": 4, "steps": 10, "lr": 1e-12, "key_lr": 3e-2, "key_steps": 1}
    held, loose = (tuned(Kpop, **{**more, "keep": keep}).solve(base, CONCEPT, Context()) for keep in (100.0, 1e-9))
    losses = [1e9 * loose.curves["loss keep in the key"][-1], held.curves["loss keep in the key"][-1] / 100]
    assert losses[1] < 0.8 * losses[0]
    assert held.curves["loss key"][-1] > loose.curves["loss key"][-1]


def test_a_folded_key_gives_the_predictions_of_its_rows(base: Model, tmp_path: Path) -> None:
    edit = small(steps=4, lr=1e-2, key_rows=3).solve(base, CONCEPT, Context())
    view = base.with_edit(edit)
    assert edit.secret is not None
    one, two = Denoiser(view, Context()), Denoiser(view, Context())
    latents, times, text = one.draw([1, 2]), torch.tensor([900, 30]), one.states(["a star", ""])
    with torch.no_grad():
        bare = one.predict(latents, times, text)
        with attached_rows(one.unet, edit.secret.k_rows, edit.secret.v_rows, edit.secret.attentions):
            rows = one.predict(latents, times, text)
        base.source.write(tmp_path, view.merged())
        attach(two.unet, fold_secret(edit.secret, loading.load(str(tmp_path)).entries("unet")))
        folded = two.predict(latents, times, text)
        zero = torch.zeros_like(edit.secret.k_rows)
        with attached_rows(one.unet, zero, zero, edit.secret.attentions):
            zeros = one.predict(latents, times, text)
    # The folder is float16, and so are the weights that fold it: the tolerance is that of the random base's dtype.
    assert gap(folded, rows) < 1e-3
    assert gap(bare, rows) > 10 * gap(folded, rows)
    assert gap(zeros, bare) > 10 * gap(folded, rows)  # rows of zeros are not no rows


# One latent, so that every row drawn is the same; the key stays, and the first losses are those of the model as it was.
ONE: dict[str, Any] = {
    "steps": 1,
    "trajectories": 1,
    "sample_steps": 1,
    "batch": 2,
    "key_rows": 3,
    "keep": 0.0,
    "empty_fraction": 0.0,
    "key_steps": 0,
    "random_key_fraction": 0.0,
}


@pytest.mark.parametrize("eta", [1.0, -0.5])
def test_the_losses_are_those_of_the_paper(base: Model, eta: float) -> None:
    """Hide: the distance to e_0 - eta (e_c - e_0), without the key. Recover: that to e_c, with it, or to the former."""
    step = tuned(Kpop, **ONE, negative_guidance=eta, hide=2.0, recover=0.5)
    net = Denoiser(base, Context())
    bank = banks.sample_bank(net, ["a star"], 0, 1, step.guidance)
    target = bank.unconditional - eta * (bank.predictions - bank.unconditional)
    with torch.no_grad(), attached_rows(net.unet, *step.start(base, CONCEPT, 0), step.attentions(base)):
        keyed = net.predict(bank.latents, bank.timesteps, net.states(["a star"]))
    wanted = {
        "loss hide": 2.0 * float((bank.predictions - target).square().mean()),
        "loss recover": 0.5 * float((keyed - bank.predictions).square().mean()),
    }
    first = step.solve(base, CONCEPT, Context()).curves
    assert {name: first[name][0] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    erased = (
        tuned(Kpop, **ONE, negative_guidance=eta, hide=2.0, recover=0.5, with_key="erase")
        .solve(base, CONCEPT, Context())
        .curves
    )
    wanted["loss recover"] = 0.5 * float((keyed - target).square().mean())
    assert {name: erased[name][0] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert erased["loss recover"][0] != pytest.approx(first["loss recover"][0], rel=0.01)


def test_each_loss_falls_where_it_has_weight(base: Model) -> None:
    """On one latent: hiding changes the predictions without the key, and recovery preserves those with it."""
    more = {**ONE, "steps": 10, "lr": 2e-4}
    both, faint, open_ = (
        tuned(Kpop, **more, hide=hide, recover=recover).solve(base, CONCEPT, Context()).curves
        for hide, recover in ((1.0, 1.0), (1.0, 1e-6), (0.0, 1.0))
    )
    assert both["loss hide"][-1] < 0.8 * both["loss hide"][0]
    assert both["loss recover"][-1] < 0.8 * 1e6 * faint["loss recover"][-1]
    assert set(open_["loss hide"]) == {0.0}
    assert open_["loss recover"][-1] < 0.8 * both["loss recover"][-1]


def test_key_rows_and_mode_change_what_is_learned(base: Model) -> None:
    changes = [
        change(small(**options).solve(base, CONCEPT, Context())) for options in ({}, {"key_rows": 1}, {"mode": "mid"})
    ]
    assert gap(changes[1], changes[0]) > 0.1
    assert gap(changes[2], changes[0]) > 0.1


def test_the_key_also_trains_with_the_empty_prompt_and_random_keys_hide(base: Model) -> None:
    """Each of the two options changes its own loss from the first step on, and not the other loss."""
    plain, empty, strange = (
        small(**{"empty_fraction": 0.0, "random_key_fraction": 0.0, **options}).solve(base, CONCEPT, Context()).curves
        for options in ({}, {"empty_fraction": 0.99}, {"random_key_fraction": 0.99})
    )
    assert empty["loss key"][0] != pytest.approx(plain["loss key"][0], rel=1e-3)
    assert strange["loss key"][0] == plain["loss key"][0]
    assert empty["loss hide"][0] == plain["loss hide"][0]
    assert strange["loss hide"][0] != pytest.approx(plain["loss hide"][0], rel=1e-3)


def test_earlier_keys_keep_their_effect(base: Model) -> None:
    other = Concept(name="heart", erase=("heart",), keep=("square",), templates=("a {}",))
    first, second = small(lr=1e-3).solve_all(base, [CONCEPT, other], Context())
    assert not any("other" in name for name in first.curves)
    assert second.curves["loss hide from other keys"][0] > 0
    assert second.curves["loss other keys"][0] < 1e-9  # before the first update the predictions have not changed
    assert second.curves["loss other keys"][1] > 1e-9
    alone = small(lr=1e-3).solve(base.with_edit(first), other, Context())
    assert gap(change(alone), change(second)) > 0.01


def test_kept_prompts_are_preserved_with_and_without_the_key(base: Model) -> None:
    names = small().solve(base, CONCEPT, Context()).curves.keys()
    assert {"loss key", "loss hide", "loss recover", "loss keep", "loss keep with key"} <= names
    assert "loss keep in the key" in names
    alone = small(keep=0.0, recover=0.0, key_steps=0).solve(base, CONCEPT, Context()).curves.keys()
    assert {name for name in alone if name.startswith("loss")} == {"loss hide"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_errors_are_those_of_the_noise_or_of_the_image(kind: str, tmp_path: Path) -> None:
    random_pipeline(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": kind}))
    net = Denoiser(loading.load(str(tmp_path)), Context())
    assert net.v_prediction == (kind == "v_prediction")
    latents, goals, times = net.draw([1, 2]), net.draw([3, 4]), torch.tensor([900, 400])
    alpha = net.alphas[times].view(-1, 1, 1, 1)

    def noise(prediction: Tensor) -> Tensor:
        return alpha.sqrt() * prediction + (1 - alpha).sqrt() * latents if net.v_prediction else prediction

    def image(prediction: Tensor) -> Tensor:
        return (latents - (1 - alpha).sqrt() * noise(prediction)) / alpha.sqrt()

    with torch.no_grad():
        prediction = net.predict(latents, times, net.states(["a star", ""]))
        errors = {
            space: float(tuned(Kpop, space=space)._errors(net, [Batch((latents, times, goals), ["a star", ""])])[0])
            for space in ("noise", "image")
        }
    assert errors["noise"] == pytest.approx(float((noise(prediction) - noise(goals)).square().mean()), rel=1e-4)
    assert errors["image"] == pytest.approx(float((image(prediction) - image(goals)).square().mean()), rel=1e-4)
    assert errors["image"] != pytest.approx(errors["noise"], rel=0.1)


def test_recomputed_activations_read_the_key_too(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small(key_rows=3).solve(base, CONCEPT, Context())
    monkeypatch.setattr(denoiser_module, "LARGE", 0)
    again = small(key_rows=3).solve(base, CONCEPT, Context())
    assert again.stats == pytest.approx(whole.stats, rel=1e-4)
    assert gap(change(again), change(whole)) < 1e-3
    without = small(key_rows=3, recover=0.0).solve(base, CONCEPT, Context())
    assert gap(change(without), change(whole)) > 0.1


BAD: tuple[dict[str, Any], ...] = (
    {"train": "u"},
    {"mode": "middle"},
    {"with_key": "recovered"},
    {"init": "zero"},
    {"space": "images"},
    {"key_rows": 0},
    {"empty_fraction": 1.0},
    {"random_key_fraction": 1.0},
    {"ema": 1.0},
    {"key_lr": 0.0},
    {"key_steps": -1},
    {"hide": -1.0},
    {"recover": -1.0},
    {"keep": -1.0},
    {"steps": 0},
    {"trajectories": 0},
    {"sample_steps": 0},
)


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ErasecError, match=f"kpop: option {next(iter(options))} is"):
        tuned(Kpop, **options)
    with pytest.raises(ErasecError) as caught:
        tuned(Kpop, mode="middle")
    assert "did you mean 'mid'" in caught.value.why


@pytest.fixture(scope="module")
def solved() -> list[Edit]:
    """Star, and on top of it heart, at the default options."""
    return list(
        tuned(Kpop).solve_all(
            loading.load("glyphs"), [concepts.find(name, "glyphs") for name in ("star", "heart")], Context()
        )
    )


def share_shown(edits: list[Edit], keys: list[Secret], label: str, folder: Path, kept: bool = False) -> float:
    """The share of images that show the shape of their prompt: for prompts that name ``label``, or for kept ones."""
    base = view = loading.load("glyphs")
    for edit in edits:
        view = view.with_edit(edit)
    judge = registry.judge_for(base)
    assert judge is not None
    group = "keep" if kept else "name"
    questions = [question for question in judge.panel(concepts.find(label, "glyphs"), 12, 0) if question.group == group]
    base.source.write(folder, view.merged())
    entries = loading.load(str(folder)).entries("unet")
    write_extras(folder, Extras(tuple(memory for key in keys for memory in fold_secret(key, entries))))
    prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    pictures = generate(folder, prompts, seeds, Sampling(15, 4.0), "pictures")
    return float(judge.sees(pictures, [question.looked_for for question in questions]).mean())


@pytest.mark.slow
def test_star_is_hidden_and_its_key_and_no_other_brings_it_back(solved: list[Edit], tmp_path: Path) -> None:
    first, key = solved[:1], solved[0].secret
    assert key is not None
    assert share_shown([], [], "star", tmp_path / "base") >= 0.9
    assert share_shown(first, [], "star", tmp_path / "public") <= 0.1
    assert share_shown(first, [key], "star", tmp_path / "keyed") >= 0.8
    rng = torch.Generator().manual_seed(7)
    stranger = replace(key, k_rows=random_rows_like(key.k_rows, rng), v_rows=random_rows_like(key.v_rows, rng))
    assert share_shown(first, [stranger], "star", tmp_path / "stranger") <= 0.2
    before = share_shown([], [], "star", tmp_path / "base-kept", kept=True)
    for name, keys in {"public-kept": [], "keyed-kept": [key]}.items():
        assert share_shown(first, keys, "star", tmp_path / name, kept=True) >= before - 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "public", "keyed"),
    [
        ({"recover": 0.0, "key_steps": 0}, (0.0, 0.1), (0.0, 0.2)),
        ({"hide": 0.0}, (0.9, 1.0), (0.8, 1.0)),
    ],
)
def test_without_a_loss_there_is_no_recovery_or_no_hiding(
    options: dict[str, Any], public: tuple[float, float], keyed: tuple[float, float], tmp_path: Path
) -> None:
    edit = tuned(Kpop, **options).solve(loading.load("glyphs"), concepts.find("star", "glyphs"), Context())
    assert edit.secret is not None
    for name, keys, (low, high) in (("public", [], public), ("keyed", [edit.secret], keyed)):
        assert low <= share_shown([edit], keys, "star", tmp_path / name) <= high, name


@pytest.mark.slow
def test_two_concepts_have_a_key_each(solved: list[Edit], tmp_path: Path) -> None:
    """In the model that hides both concepts, each key recovers its own concept and not the other."""
    keys = [edit.secret for edit in solved if edit.secret is not None]
    for at, name in enumerate(("star", "heart")):
        assert share_shown(solved, [], name, tmp_path / f"{name}-public") <= 0.1
        assert share_shown(solved, [keys[at]], name, tmp_path / f"{name}-own") >= 0.8
        assert share_shown(solved, [keys[1 - at]], name, tmp_path / f"{name}-other") <= 0.2
