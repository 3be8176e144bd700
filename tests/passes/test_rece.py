"""RECE on a model with random weights: derived embeddings and edits against sums and inverses at every site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from glyph_passes import tuned

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.view import Model
from erasec.passes.rece import Rece, derive_map
from erasec.recipe.concept import Concept

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", keep=("square",), templates=("{}", "a {}"))


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return loading.load(str(random_folder))


def test_derived_embeddings_are_the_papers(model: Model) -> None:
    """Equation 9, summed site by site: c* = (lam I + sum W^T W)^-1 (sum W^T W0) c, and M^-1 c as lam goes to 0."""
    sites = model.streams["context"]
    energy = tuned(Rece).shared_sums(model)["context.energy"]
    width = len(energy)
    draw = torch.Generator().manual_seed(0)
    matrix = (
        torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(width, width, generator=draw).double() / width**0.5
    )
    state, lam = torch.randn(width, generator=draw).double(), 0.1
    left, right = lam * torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for site in sites:
        first = model.stored_weight(site).double()
        now = first @ matrix
        left, right = left + now.T @ now, right + now.T @ (first @ state)
    expected = torch.linalg.inv(left) @ right
    assert torch.allclose(derive_map(energy, matrix, lam, relative=False) @ state, expected, atol=1e-9)
    undone = torch.linalg.solve(matrix, state)
    gaps = [
        float((derive_map(energy, matrix, lam) @ state - undone).norm() / undone.norm()) for lam in (0.1, 1e-3, 1e-9)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-5 < gaps[0]


def test_an_epoch_is_the_naive_edit_of_the_weights_edited_so_far(model: Model) -> None:
    """Per site, explicit inverse, targets from the current weights; what was erased before is kept erased."""
    step = tuned(Rece, epochs=1, ridge=0.05, derive=0.05)
    edit = step.solve(model, CONCEPT, Context())
    first = tuned(Rece, epochs=0, ridge=0.05).solve(model, CONCEPT, Context())
    system = {part: edit.sums["star"][f"context.{part}"] for part in ("source", "shift", "keep")}
    source, target = system["source"], system["source"] + system["shift"]
    energy = edit.sums[""]["context.energy"]
    base = torch.eye(len(energy), dtype=torch.float64)
    matrix = base + next(iter(first.deltas.values())).change(base)
    derived = source @ derive_map(energy, matrix, 0.05).T
    keep = torch.cat([system["keep"], source])
    gram = derived.T @ derived + keep.T @ keep
    gram = gram + 0.05 * gram.diagonal().mean() * base
    for site in model.streams["context"][:4]:
        weight = model.stored_weight(site).double() @ matrix
        left = (gram - derived.T @ derived - keep.T @ keep)[0, 0] * weight
        left = left + (weight @ target.T) @ derived + (weight @ keep.T) @ keep
        expected = left @ torch.linalg.inv(gram)
        actual = model.stored_weight(site).double() + edit.deltas[site].change(model.stored_weight(site))
        assert float((actual - expected).norm() / (expected - weight).norm()) < 1e-6


def test_epochs_make_the_concept_harder_to_bring_back(model: Model) -> None:
    """The embedding that undoes the first edit best brings back less of the concept after each epoch."""
    base = torch.eye(len(tuned(Rece).shared_sums(model)["context.energy"]), dtype=torch.float64)

    def brought_back(epochs: int) -> float:
        edit = tuned(Rece, epochs=epochs).solve(model, CONCEPT, Context())
        first = tuned(Rece, epochs=0).solve(model, CONCEPT, Context())
        start = base + next(iter(first.deltas.values())).change(base)
        now = base + next(iter(edit.deltas.values())).change(base)
        source, shift = (edit.sums["star"][f"context.{part}"] for part in ("source", "shift"))
        attack = source @ derive_map(edit.sums[""]["context.energy"], start, 1e-2).T
        return float(((attack @ now.T - source) * -1).norm() / shift.norm())

    distances = [brought_back(epochs) for epochs in (0, 1, 2)]
    assert distances[0] < distances[1]


def test_a_singular_system_names_the_option() -> None:
    with pytest.raises(ErasecError, match="derived embeddings") as caught:
        derive_map(torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), 0.0, relative=False)
    assert "derive" in caught.value.fix


@pytest.mark.parametrize("options", [{"epochs": -1}, {"derive": 0.0}, {"scale": 0.0}])
def test_bad_options_are_errors(options: dict[str, object]) -> None:
    with pytest.raises(ErasecError, match="rece"):
        tuned(Rece, **options)  # type: ignore[arg-type]
