"""Changes of a released model: each one changes what it says, and the subject itself stays as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from erasec.audit.changed import Changed, Precision, Strength, TextEncoder, changed_network, round_half, round_int8
from erasec.audit.subject import Subject
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.edit import Dense, Edit
from erasec.model.view import Model


def edited(base: Model, component: str) -> Model:
    """The base with one changed matrix of a component."""
    site = next(site for site in base.parameters if site.component == component and len(site.shape) == 2)
    noise = torch.randn(site.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return base.with_edit(Edit({site: Dense(noise * base.weight(site).std())}, "hand", ("star",), ""))


def make_bench(base: Model) -> Any:
    memory: dict[Any, Any] = {}

    def remember(key: Any, make: Any) -> Any:
        if key not in memory:
            memory[key] = make()
        return memory[key]

    return SimpleNamespace(
        base=Subject("base", base, Context()),
        concept=SimpleNamespace(name="star"),
        settings=SimpleNamespace(images=1, steps=1, guidance=1.0, seed=0),
        prompts=lambda group: [f"a {group}"],
        seeds=lambda purpose, count: list(range(count)),
        remember=remember,
    )


@pytest.mark.parametrize("shape", [(6, 40), (4, 3, 3, 3)])
def test_int8_errors_are_at_most_half_of_the_scale_of_their_channel(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] *= 100  # another channel's range must not matter
    rounded = round_int8("weight", weight)
    scale = weight.flatten(1).abs().amax(1) / 127
    error = (rounded - weight).flatten(1).abs().amax(1)
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert (error > 0).all()
    assert all(len(channel.unique()) <= 255 for channel in rounded.flatten(1))
    bias = torch.randn(5)
    assert torch.equal(round_int8("bias", bias), bias)
    assert torch.equal(round_int8("weight", torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(round_half("bias", bias), bias.half().float())


def test_a_changed_network_is_a_copy(base: Model) -> None:
    subject = Subject("model", base, Context())
    before = {key: value.clone() for key, value in subject.denoiser.unet.named_parameters()}
    changed = changed_network(subject, "zero", lambda key, value: torch.zeros_like(value))
    assert isinstance(changed, Changed)
    assert not any(value.any() for value in changed.denoiser.unet.parameters())
    assert all(torch.equal(value, before[key]) for key, value in subject.denoiser.unet.named_parameters())
    assert changed.digest != subject.digest
    assert changed.text_encoder is subject.text_encoder
    changed.release()
    assert not any(value.any() for value in changed.denoiser.unet.parameters())


def test_the_strength_of_an_edit_is_that_share_of_its_change(base: Model) -> None:
    model = edited(base, "unet")
    (site,) = model.edited_sites
    bench, subject = make_bench(base), Subject("model", model, Context())
    change = model.weight(site) - base.weight(site)
    for made, share in zip(Strength().changes(bench, subject), (0.5, 1.5), strict=True):
        assert f"{share:g}" in made.variant
        expected = base.weight(site) + share * change
        assert torch.allclose(made.subject.model.weight(site), expected, atol=1e-6)
    # The base has no edit, and stays as it is.
    assert all(made.subject is bench.base for made in Strength().changes(bench, bench.base))


def test_the_stock_text_encoder_undoes_an_edit_of_the_text_side_alone(base: Model) -> None:
    bench = make_bench(base)
    subject = Subject("model", edited(base, "text_encoder"), Context())
    expected = bench.base.states(["a star"])
    own = subject.states(["a star"])
    assert not torch.allclose(own, expected, atol=1e-3)
    (made,) = TextEncoder().changes(bench, subject)
    assert torch.allclose(made.subject.states(["a star"]), expected, atol=1e-4)
    assert torch.equal(subject.states(["a star"]), own)
    with pytest.raises(ErasecError, match="that of the base"):
        next(TextEncoder().changes(bench, Subject("model", edited(base, "unet"), Context())))
    # References have no edit of the text side, and are painted all the same.
    assert len(list(TextEncoder().changes(bench, bench.base))) == 1


def test_attack_and_control_paint_the_same_changes_with_other_prompts(base: Model) -> None:
    bench, subject = make_bench(base), Subject("model", base, Context())
    attack, control = list(Precision().attack(bench, subject)), list(Precision().control(bench, subject))
    assert [attempt.variant for attempt in attack] == ["float16", "int8"]
    assert [attempt.variant for attempt in control] == ["float16", "int8"]
    # The weights of this model are stored as float16: rounding changes nothing.
    plain = subject.pictures(["a name"], [0], 1, 1.0)
    assert np.array_equal(attack[0].pictures[:, 0], plain)
    assert not np.array_equal(attack[1].pictures[:, 0], plain)
