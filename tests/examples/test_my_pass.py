from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasec import registry
from erasec.base import Context, Pass
from erasec.model import loading
from erasec.model.view import Model
from erasec.recipe.concept import Concept

STAR = Concept(name="star", erase=("star",), synonyms=("pentagram",), anchor="circle")


@pytest.fixture(scope="module")
def project_out(root: Path) -> Callable[..., Pass]:
    return registry.load_pass(f"{root / 'examples' / 'my_pass.py'}:ProjectOut")


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return loading.load(str(random_folder))


def last(model: Model, *phrases: str) -> Tensor:
    """The state at each phrase's last token, float64 (d, phrases)."""
    tokens = model.encode(phrases)
    return torch.stack([states[end] for states, end in zip(tokens.states, tokens.last, strict=True)], 1).double()


def test_names_of_the_concept_give_the_keys_and_values_of_the_anchor(
    model: Model, project_out: Callable[..., Pass]
) -> None:
    edited = model.with_edit(project_out().solve(model, STAR, Context()))
    differences = last(model, "star", "pentagram") - last(model, "circle")
    for site in model.select("cross", "kv"):
        before, after = model.weight(site) @ differences, edited.weight(site) @ differences
        assert after.norm() <= 1e-10 * before.norm()
        assert before.norm() > 0.01 * model.weight(site).norm() * differences.norm()  # unedited, they differ


def test_what_is_orthogonal_stays(model: Model, project_out: Callable[..., Pass]) -> None:
    edited = model.with_edit(project_out().solve(model, STAR, Context()))
    basis = torch.linalg.qr(last(model, "star", "pentagram") - last(model, "circle"))[0]
    heart = last(model, "heart")
    rest = heart - basis @ (basis.T @ heart)
    for site in model.select("cross", "kv"):
        torch.testing.assert_close(edited.weight(site) @ rest, model.weight(site) @ rest, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(edited.weight(site) @ heart, model.weight(site) @ heart)  # heart is not all rest


def test_only_its_sites_move(model: Model, project_out: Callable[..., Pass]) -> None:
    edit = project_out().solve(model, STAR, Context())
    edited = model.with_edit(edit)
    moved = {site for site in model.sites if not torch.equal(model.weight(site), edited.weight(site))}
    assert moved == set(edit.deltas) == set(model.select("cross", "kv"))
    assert len(moved) < len(model.sites)


def test_strength_scales_the_edit(model: Model, project_out: Callable[..., Pass]) -> None:
    whole, half = (project_out(strength=strength).solve(model, STAR, Context()) for strength in (1.0, 0.5))
    for site, delta in whole.deltas.items():
        weight = model.stored_weight(site)
        torch.testing.assert_close(half.deltas[site].change(weight) * 2, delta.change(weight))
        assert delta.change(weight).norm() > 0


def test_a_concept_that_is_its_own_anchor_changes_nothing(model: Model, project_out: Callable[..., Pass]) -> None:
    edit = project_out().solve(model, Concept(name="same", erase=("star",), anchor="star"), Context())
    assert edit.deltas
    assert all(delta.change(model.stored_weight(site)).norm() == 0 for site, delta in edit.deltas.items())


def test_the_whole_pass_is_forty_lines(root: Path) -> None:
    assert len((root / "examples/my_pass.py").read_text().splitlines()) <= 40
