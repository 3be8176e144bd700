"""Stable Diffusion XL has two routes for text: token states, and a pooled state that is embedded with the timestep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import random_models
import torch

from erasec.base import Context
from erasec.model.edit import Edit
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.training.denoiser import Denoiser

DOG = Concept(name="dog", erase=("dog",), anchor="cat", keep=("horse",), templates=("a {}",))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Edit]:
    folder: Path = tmp_path_factory.mktemp("xl") / "model"
    random_models.random_folder(folder, "sdxl", "tiny")
    model = load(str(folder))
    return model, Uce(ridge=1e-6).solve(model, DOG, Context())


def distance(model: Model, base: Model, prompt: str, goal: str) -> float:
    """How far the prediction of ``model`` for a prompt is from that of the base for another one, relative to how far
    the base's two predictions are apart."""
    own, original = Denoiser(model, Context(side=64)), Denoiser(base, Context(side=64))
    latents, timestep = original.draw([3]), torch.tensor([600])
    with torch.no_grad():
        after = own.predict(latents, timestep, own.states([prompt]))
        before, wanted = (original.predict(latents, timestep, original.states([text])) for text in (prompt, goal))
    return float((after - wanted).norm() / (before - wanted).norm())


def test_both_routes_lead_to_the_anchor(edited: tuple[Model, Edit]) -> None:
    base, edit = edited
    pooled = {site: delta for site, delta in edit.deltas.items() if site.attn == "pooled"}
    assert [site.key for site in pooled] == ["add_embedding.linear_1.weight"]
    tokens = {site: delta for site, delta in edit.deltas.items() if site not in pooled}
    whole = distance(base.with_edit(edit), base, "a dog", "a cat")
    tokens_alone = distance(base.with_edit(replace(edit, deltas=tokens)), base, "a dog", "a cat")
    pooled_alone = distance(base.with_edit(replace(edit, deltas=pooled)), base, "a dog", "a cat")
    assert whole < 0.05
    # Each route by itself still brings the concept: this is why an edit of the keys and values alone is not enough.
    assert tokens_alone > 3 * whole and pooled_alone > 3 * whole
    assert distance(base.with_edit(edit), base, "a horse", "a cat") > 0.9


def test_the_token_states_alone_can_be_edited(edited: tuple[Model, Edit]) -> None:
    base, whole = edited
    step = Uce(ridge=1e-6, routes="tokens")
    edit = step.solve(base, DOG, Context())
    assert set(edit.deltas) == set(step.sites(base)) == {site for site in whole.deltas if site.attn == "cross"}


def test_the_columns_of_the_sizes_stay(edited: tuple[Model, Edit]) -> None:
    base, edit = edited
    site = next(site for site in edit.deltas if site.attn == "pooled")
    change = edit.deltas[site].change(base.stored_weight(site))
    config = base.source.config("unet")
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    assert not change[:, width:].any() and change[:, :width].any()
