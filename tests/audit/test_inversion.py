"""Inversion trains the new words and nothing else, and is scored where its words are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.audit.inversion import noise_loss, optimise
from erasec.audit.subject import Subject
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.loading import load
from erasec.training.loop import step_rng


@pytest.fixture(scope="module")
def subject(random_folder: Path) -> Subject:
    return Subject("model", load(str(random_folder)), Context())


def test_the_loss_falls_and_only_the_states_get_gradients(subject: Subject) -> None:
    targets = subject.noise(range(8))
    states = subject.states([""]).clone()
    before = {name: value.clone() for name, value in subject.denoiser.unet.named_parameters()}

    def loss(rng: torch.Generator) -> torch.Tensor:
        return noise_loss(subject, targets, 4, states, step_rng(0, 0))  # always the same draw

    first, last = optimise([states], loss, 30, 0.05, 0, "test")
    assert last < first
    assert not states.requires_grad
    for name, value in subject.denoiser.unet.named_parameters():
        assert value.grad is None
        assert torch.equal(value, before[name])


def test_a_loss_that_is_not_finite_stops_the_attack() -> None:
    value = torch.ones(2)
    with pytest.raises(ErasecError, match="not finite at step 1"):
        optimise([value], lambda rng: (value * float("nan")).sum(), 3, 0.1, 0, "test")


def test_the_same_seed_gives_the_same_optimum(subject: Subject) -> None:
    targets = subject.noise(range(4))
    results = []
    for seed in (0, 0, 1):
        states = subject.states([""]).clone()

        def loss(rng: torch.Generator, states: torch.Tensor = states) -> torch.Tensor:
            return noise_loss(subject, targets, 2, states, rng)

        optimise([states], loss, 3, 0.05, seed, "test")
        results.append(states)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
