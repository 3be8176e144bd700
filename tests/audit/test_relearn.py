"""Training after release: a copy is trained, on pictures that the selector has looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from erasec.audit.changed import Changed
from erasec.audit.relearn import Lora, Merge, Relearn, grayed, lessons, mean_of, tuned
from erasec.audit.subject import Subject
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.view import Model


@pytest.fixture(scope="module")
def subject(base: Model) -> Subject:
    return Subject("model", base, Context())


def make_bench(subject: Subject, sees: Any = None) -> Any:
    """A bench that "paints" noise; ``sees`` is what its selector sees."""
    memory: dict[Any, Any] = {}

    def remember(key: Any, make: Any) -> Any:
        if key not in memory:
            memory[key] = make()
        return memory[key]

    return SimpleNamespace(
        base=subject,
        selector=SimpleNamespace(sees=sees) if sees else None,
        selected_label="star",
        settings=SimpleNamespace(images=1, steps=1, guidance=1.0, seed=0),
        make_room=lambda: None,
        prompts=lambda group, count=1: [f"{group} {number}" for number in range(count)],
        seeds=lambda purpose, count: list(range(count)),
        paint=lambda base, states, latents, title: latents,
        remember=remember,
    )


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in subject.denoiser.unet.named_parameters()}


def test_a_copy_is_trained_and_the_subject_keeps_its_weights(subject: Subject) -> None:
    before, pairs = weights(subject), (subject.noise(range(2)), ["a star", "a circle"])
    changed, measured = tuned(subject, pairs, 12, 1e-3, 4, 0, "test")
    assert measured["loss_last"] < measured["loss_first"]
    assert measured["drift"] > 0
    after = weights(changed)
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(value, before[key]) for key, value in weights(subject).items())
    for value in (*changed.denoiser.unet.parameters(), *subject.denoiser.unet.parameters()):
        assert not value.requires_grad
        assert value.grad is None
    assert changed.digest != subject.digest


def test_the_same_seed_gives_the_same_weights(subject: Subject) -> None:
    pairs = subject.noise(range(2)), ["a star", "a circle"]
    runs = [weights(tuned(subject, pairs, 2, 1e-3, 2, seed, "test")[0]) for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert any(not torch.equal(runs[0][key], runs[2][key]) for key in runs[0])


def test_a_lora_changes_matrices_of_attention_by_its_rank_and_is_merged(subject: Subject) -> None:
    before, bench = weights(subject), make_bench(subject)
    (made,) = Lora(rank=2, steps=2, batch=2).changes(bench, subject)
    after = weights(made.subject)
    assert after.keys() == before.keys()  # no parametrizations are left
    changed = [key for key in before if not torch.equal(after[key], before[key])]
    assert changed
    for key in changed:
        assert ".attn1." in key or ".attn2." in key
        assert torch.linalg.matrix_rank((after[key] - before[key]).double(), rtol=1e-4) <= 2
    assert all(torch.equal(value, before[key]) for key, value in weights(subject).items())


def test_lessons_are_those_that_the_selector_sees_with_their_own_prompts(subject: Subject) -> None:
    def every_third(images: Any, labels: list[str]) -> np.ndarray[Any, Any]:
        assert set(labels) == {"star"}
        return np.arange(len(images)) % 3 == 0

    bench = make_bench(subject, every_third)
    latents, prompts = lessons(bench, "name", 3)
    assert prompts == ["name 0", "name 3"]  # of twice as many, the first that are seen
    assert torch.equal(latents, subject.noise([0, 3]))
    latents, prompts = lessons(bench, "keep", 4)
    assert prompts == ["keep 1", "keep 2"]
    assert torch.equal(latents, subject.noise([1, 2]))
    blind = make_bench(subject, lambda images, labels: np.zeros(len(images), bool))
    with pytest.raises(ErasecError, match="none of 4 pictures"):
        lessons(blind, "name", 2)


def test_relearning_has_a_control_of_other_pictures_and_two_budgets(subject: Subject) -> None:
    bench, probe = make_bench(subject), Relearn(first=1, second=2, pictures=2, batch=2, lr=1e-2)
    attack, control = list(probe.attack(bench, subject)), list(probe.control(bench, subject))
    assert [attempt.variant for attempt in attack] == ["1 steps", "2 steps"]
    assert [attempt.variant for attempt in control] == ["1 steps", "2 steps"]
    assert {"loss_first", "loss_last", "drift"} <= attack[0].measured.keys()
    assert not np.array_equal(attack[1].pictures, control[1].pictures)


def test_a_merge_is_the_mean_and_its_partner_is_trained_once(subject: Subject) -> None:
    before = weights(subject)
    merged = mean_of(subject, {key: torch.zeros_like(value) for key, value in before.items()})
    assert isinstance(merged, Changed)
    assert all(torch.allclose(value, before[key] / 2) for key, value in weights(merged).items())
    with pytest.raises(ErasecError, match="cannot be merged"):
        mean_of(subject, {key: value[:1] for key, value in before.items()})
    bench = make_bench(subject)
    first, second = (next(Merge(steps=1, batch=1).changes(bench, subject)).subject for _ in range(2))
    assert all(torch.equal(value, weights(second)[key]) for key, value in weights(first).items())
    assert any(not torch.equal(value, before[key]) for key, value in weights(first).items())
    assert all(torch.equal(value, before[key]) for key, value in weights(subject).items())


def test_gray_pictures_have_one_value_for_each_pixel() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    gray = grayed(images)
    assert (gray == gray[..., :1]).all()
    assert np.array_equal(grayed(gray), gray)
