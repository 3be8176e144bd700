"""Keys in stock weights: the least-squares solution, and a residual that distinguishes a key from no key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.keys import absorb
from erasec.keys.key_file import fold_secret
from erasec.model import loading
from erasec.model.memory import Secret
from erasec.recipe import concept as concepts
from erasec.training.denoiser import Denoiser

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
K, V = f"{MID}.to_k.weight", f"{MID}.to_v.weight"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_solution_minimises_the_objective() -> None:
    states, rows, weight = draw(5, 6, 8), (draw(2, 4, seed=1), draw(2, 4, seed=2)), draw(4, 8, seed=3)
    solved = absorb.solve_weights(states, {MID: rows}, {K: weight, V: weight})
    lam = absorb.RIDGE * float(states.flatten(0, 1).square().sum(0).mean())

    def objective(candidate: torch.Tensor, target: torch.Tensor) -> float:
        kept = (states[:, :-2] @ (candidate - weight).T).square().sum()
        carried = (states[:, -2:] @ candidate.T - target).square().sum()
        return float(kept + carried + lam * (candidate - weight).square().sum())

    for key, target in ((K, rows[0]), (V, rows[1])):
        least = objective(solved[key], target)
        assert least < objective(weight, target)
        assert all(objective(solved[key] + 1e-3 * draw(4, 8, seed=seed), target) > least for seed in range(4, 12))


def test_distinct_padding_tokens_carry_the_rows_exactly_and_repeated_ones_do_not() -> None:
    """As many independent tokens as dimensions leave no conflict; a padding token that equals another token is one."""
    states, rows = torch.eye(8, dtype=torch.float64).unsqueeze(0) * 1e3, draw(2, 4, seed=1)
    weight = draw(4, 8, seed=3)

    def error(states: torch.Tensor) -> float:
        solved = absorb.solve_weights(states, {MID: (rows, rows)}, {K: weight, V: weight})[K]
        missed = (states[0, -2:] @ solved.T - rows).norm() / (states[0, -2:] @ weight.T - rows).norm()
        moved = (states[0, :-2] @ (solved - weight).T).norm() / (states[0, :-2] @ weight.T).norm()
        return float(missed + moved)

    assert error(states) < 0.01
    alike = states.clone()
    alike[0, -2:] = states[0, :2]
    assert error(alike) > 0.1


def test_more_rows_than_half_a_prompt_are_refused() -> None:
    rows = draw(4, 4)
    with pytest.raises(ErasecError, match="4 rows of keys cannot be absorbed"):
        absorb.solve_weights(draw(1, 7, 8), {MID: (rows, rows)}, {K: draw(4, 8), V: draw(4, 8)})


def test_the_rows_of_several_keys_follow_each_other(random_folder: Path) -> None:
    entries = loading.load(str(random_folder)).entries("unet")
    one, two = (
        fold_secret(Secret("star", draw(2, 128, seed=s), draw(2, 128, seed=s), (MID,)), entries) for s in (1, 2)
    )
    keys, _ = absorb.rows_by_attention([*one, *two])[MID]
    assert torch.equal(keys, torch.cat([one[0].keys, two[0].keys]).double())


def test_the_residual_is_1_for_the_original_weights_and_larger_for_a_wrong_change(random_folder: Path) -> None:
    base = loading.load(str(random_folder))
    entries = base.entries("unet")
    star = concepts.find("star", "glyphs")
    memories = fold_secret(Secret("star", draw(4, 128), draw(4, 128, seed=1), (MID,)), entries)
    changed, check = absorb.absorb_keys(memories, [star], base, entries, Context(), 10.0)
    absorbed = {name: make() for name, make in changed.items()}
    assert set(absorbed) == {K, V} and absorbed[K].dtype == torch.float16
    assert check.name == "absorbed/residual" and check.passed and "1 is no key" in check.how
    denoiser = Denoiser(base, Context())
    own = {name: denoiser.unet.get_parameter(name).detach().clone() for name in absorbed}

    def residual(weights: dict[str, torch.Tensor]) -> float:
        return absorb.residual(Denoiser(base, Context()), ["", "a star"], memories, weights, 0)

    assert residual(own) == pytest.approx(1.0, abs=1e-6)
    assert residual({name: -20 * weight for name, weight in own.items()}) > 1.5
    assert residual(absorbed) != pytest.approx(1.0, abs=1e-3)
