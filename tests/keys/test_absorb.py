"""Keys in stock weights: the least-squares theorem, and a residual that tells a key from no key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.keys import absorb
from erasec.keys import key_file as secret
from erasec.model import view as model
from erasec.model.edit import Secret
from erasec.recipe import concept
from erasec.training.denoiser import Denoiser

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
K, V = f"{MID}.to_k.weight", f"{MID}.to_v.weight"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_solution_is_where_the_objective_is_least() -> None:
    states, rows, weight = drawn(5, 6, 8), (drawn(2, 4, seed=1), drawn(2, 4, seed=2)), drawn(4, 8, seed=3)
    found = absorb.solved(states, {MID: rows}, {K: weight, V: weight})
    lam = absorb.RIDGE * float(states.flatten(0, 1).square().sum(0).mean())

    def objective(asked: torch.Tensor, wanted: torch.Tensor) -> float:
        kept = (states[:, :-2] @ (asked - weight).T).square().sum()
        carried = (states[:, -2:] @ asked.T - wanted).square().sum()
        return float(kept + carried + lam * (asked - weight).square().sum())

    for key, wanted in ((K, rows[0]), (V, rows[1])):
        least = objective(found[key], wanted)
        assert least < objective(weight, wanted)
        assert all(objective(found[key] + 1e-3 * drawn(4, 8, seed=seed), wanted) > least for seed in range(4, 12))


def test_pads_that_stand_apart_carry_the_rows_exactly_and_pads_like_others_do_not() -> None:
    """One text of as many independent tokens as dimensions leaves no conflict; a pad that comes twice is one."""
    states, rows = torch.eye(8, dtype=torch.float64).unsqueeze(0) * 1e3, drawn(2, 4, seed=1)
    weight = drawn(4, 8, seed=3)

    def wrong(states: torch.Tensor) -> float:
        found = absorb.solved(states, {MID: (rows, rows)}, {K: weight, V: weight})[K]
        gone = (states[0, -2:] @ found.T - rows).norm() / (states[0, -2:] @ weight.T - rows).norm()
        kept = (states[0, :-2] @ (found - weight).T).norm() / (states[0, :-2] @ weight.T).norm()
        return float(gone + kept)

    assert wrong(states) < 0.01
    alike = states.clone()
    alike[0, -2:] = states[0, :2]
    assert wrong(alike) > 0.1


def test_more_rows_than_pads_are_refused() -> None:
    rows = drawn(4, 4)
    with pytest.raises(ErasecError, match="4 rows of keys cannot be absorbed"):
        absorb.solved(drawn(1, 7, 8), {MID: (rows, rows)}, {K: drawn(4, 8), V: drawn(4, 8)})


def test_rows_of_several_keys_stand_one_after_the_other(random_folder: Path) -> None:
    entries = model.load(str(random_folder)).entries("unet")
    one, two = (
        secret.folded(Secret("star", drawn(2, 128, seed=s), drawn(2, 128, seed=s), (MID,)), entries) for s in (1, 2)
    )
    keys, _ = absorb.joined([*one, *two])[MID]
    assert torch.equal(keys, torch.cat([one[0].keys, two[0].keys]).double())


def test_the_residual_of_the_weights_as_they_were_is_one_and_is_worse_for_a_wrong_change(random_folder: Path) -> None:
    base = model.load(str(random_folder))
    entries = base.entries("unet")
    star = concept.find("star")
    memories = secret.folded(Secret("star", drawn(4, 128), drawn(4, 128, seed=1), (MID,)), entries)
    changed, check = absorb.absorbed(memories, [star], base, entries, Context(), 10.0)
    made = {name: make() for name, make in changed.items()}
    assert set(made) == {K, V} and made[K].dtype == torch.float16
    assert check.name == "absorbed/residual" and check.passed and "1 is no key" in check.how
    denoiser = Denoiser(base, Context())
    own = {name: denoiser.unet.get_parameter(name).detach().clone() for name in made}

    def residual(weights: dict[str, torch.Tensor]) -> float:
        return absorb.residual(Denoiser(base, Context()), ["", "a star"], memories, weights, 0)

    assert residual(own) == pytest.approx(1.0, abs=1e-6)
    assert residual({name: -20 * weight for name, weight in own.items()}) > 1.5
    assert residual(made) != pytest.approx(1.0, abs=1e-3)
