"""Searching for text states: what is searched, that the search reaches the network, and what "recovered" means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from erasec.base import Context
from erasec.model.view import Model
from erasec.training import banks
from erasec.training.banks import Bank
from erasec.training.base import MEASURE_EVERY
from erasec.training.denoiser import Denoiser
from erasec.training.loop import Objective, fit, step_rng
from erasec.training.state_search import REPEATED, StateSearch

PROMPTS = ["a star", "a star", "a star"]


@pytest.fixture(scope="module")
def denoiser(base: Model) -> Denoiser:
    return Denoiser(base, Context())


@pytest.fixture(scope="module")
def bank(denoiser: Denoiser) -> Bank:
    return banks.sample_attacked(denoiser, PROMPTS, 0, 4, 3.0, 8)


def search(denoiser: Denoiser, bank: Bank, restart: int = 0, seed: int = 0) -> StateSearch:
    return StateSearch(denoiser, bank, PROMPTS, 4, 8, seed, restart)


def test_the_bank_holds_trajectories_and_noised_pictures(denoiser: Denoiser, bank: Bank) -> None:
    assert len(bank.latents) == 3 * (4 + 8)
    assert torch.equal(bank.latents[:12], banks.sample_bank(denoiser, PROMPTS, 0, 4, 3.0).latents)
    # One timestep in each of 24 equal parts of the schedule.
    assert sorted(int(t) * 24 // denoiser.steps for t in bank.timesteps[12:]) == list(range(24))
    # A picture that is hardly noised is the last picture of its trajectory.
    least = 12 + int(bank.timesteps[12:].argmin())
    final = denoiser.sample(PROMPTS, banks.training_seeds(0, 3), 4, 3.0).final[bank.prompt_index[least]]
    alpha = denoiser.alphas[bank.timesteps[least]]
    assert float((bank.latents[least] - alpha.sqrt() * final).std()) == pytest.approx(
        float((1 - alpha).sqrt()), rel=0.3
    )
    predictions = banks.predict_bank(denoiser, bank)
    assert torch.allclose(predictions, bank.predictions, atol=1e-5)
    unprompted = banks.predict_bank(denoiser, replace(bank, prompts=("",) * 3))
    assert torch.allclose(unprompted, bank.unconditional, atol=1e-5)
    assert not torch.allclose(bank.predictions, bank.unconditional, atol=1e-4)


def test_the_first_row_stays_and_every_fourth_state_repeats_one(denoiser: Denoiser, bank: Bank) -> None:
    searched = search(denoiser, bank)
    states = searched.states(torch.arange(4))
    assert states.shape == denoiser.states([""]).expand(4, -1, -1).shape
    assert torch.equal(states[:, 0], denoiser.states([""])[:, 0].expand(4, -1))
    repeated = [bool((row[1:] == row[1]).all()) for row in states]
    assert repeated == [number % REPEATED == REPEATED - 1 for number in range(4)]
    near = [float((states[n, 1:] - denoiser.states([text])[0, 1:]).std()) for n, text in ((0, "a star"), (1, ""))]
    assert max(near) < 0.1 * float(denoiser.states(["a star"]).std())
    assert not torch.equal(states, denoiser.states(["a star", "", "a star", ""]))


def test_the_search_reaches_the_network_and_nothing_else_gets_gradients(denoiser: Denoiser, bank: Bank) -> None:
    searched = search(denoiser, bank)
    searched.free.requires_grad_(True)
    (loss,) = searched.loss(step_rng(0, 0)).values()
    loss.backward()
    assert searched.free.grad is not None
    assert all(float(grad.abs().max()) > 0 for grad in searched.free.grad)
    assert all(weight.grad is None for weight in denoiser.unet.parameters())
    with torch.no_grad():
        before = float(loss)
        searched.free += 1.0
        (after,) = searched.loss(step_rng(0, 0)).values()
    assert float(after) != before


def test_what_is_recovered_is_1_for_the_prompt_and_0_for_the_empty_one(denoiser: Denoiser, bank: Bank) -> None:
    searched = search(denoiser, bank)
    empty = denoiser.states([""])[0, 1:]
    searched.free[:] = empty
    # In a state that repeats a row there is not the empty prompt, but another one.
    assert 0.0 <= searched.recovered() < 0.5
    searched.free[2] = denoiser.states(["a star"])[0, 1:]
    assert searched.recovered() == pytest.approx(1.0, abs=1e-4)


def test_the_rows_that_measure_are_never_searched_on(denoiser: Denoiser, bank: Bank) -> None:
    searched = search(denoiser, bank)
    drawn = {int(row) for step in range(50) for row in searched.draw(step_rng(0, step))}
    held_out = set(searched.held_out.tolist())
    assert len(held_out) == 16
    assert drawn == set(range(len(bank.latents))) - held_out
    assert set(search(denoiser, bank, seed=1).held_out.tolist()) != held_out


def test_a_search_lowers_its_loss_and_recovers_more(denoiser: Denoiser, bank: Bank) -> None:
    searched = search(denoiser, bank)
    searched.free[:] = denoiser.states([""])[0, 1:]
    before = searched.recovered()
    start = searched.free.clone()
    run = fit("search", [Objective({"states": searched.free}, 0.05, searched.loss)], steps=60, seed=0)
    losses = run.curves["loss search"]
    assert sum(losses[-15:]) < sum(losses[:15])
    assert searched.recovered() > before + 0.1
    # The control: without steps nothing moves.
    assert not torch.equal(searched.free, start)
    searched.free[:] = start
    fit("search", [Objective({"states": searched.free}, 0.05, searched.loss)], steps=0, seed=0)
    assert searched.recovered() == before


def test_it_is_measured_at_times_and_one_state_starts_anew(denoiser: Denoiser, bank: Bank) -> None:
    searched = search(denoiser, bank, restart=MEASURE_EVERY * 2)
    searched.free += 5.0
    moved = searched.free.clone()
    measured = []
    for step in range(2 * MEASURE_EVERY):
        searched.step = step
        measured.append(searched.after_step())
    assert [bool(value) for value in measured] == [(step + 1) % MEASURE_EVERY == 0 for step in range(len(measured))]
    changed = [not torch.equal(one, two) for one, two in zip(searched.free, moved, strict=True)]
    assert changed == [False, True, False, False]
