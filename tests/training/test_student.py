"""The student: teacher and student are one network, and only the declared tensors train."""

from __future__ import annotations

import pytest
import torch

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.edit import Dense, Edit, LowRank
from erasec.model.view import Model
from erasec.training.denoiser import Denoiser
from erasec.training.student import Student


def predict(denoiser: Denoiser) -> torch.Tensor:
    latents = denoiser.draw([0, 1])
    with torch.no_grad():
        return denoiser.predict(latents, torch.tensor([700, 20]), denoiser.states(["a star", ""]))


@pytest.mark.parametrize("rank", [0, 2])
def test_the_teacher_is_unchanged_and_shares_all_frozen_tensors(base: Model, denoiser: Denoiser, rank: int) -> None:
    before = predict(denoiser)
    storage = {key: value.data_ptr() for key, value in denoiser.unet.named_parameters()}
    sites = base.select("cross", ("k", "v"))
    student = Student({"unet": denoiser.unet}, sites, rank)
    assert torch.allclose(predict(denoiser), before, atol=1e-6)
    with torch.no_grad():
        for value in student.parameters.values():
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    after = predict(denoiser)
    assert not torch.allclose(after, before, atol=1e-3)
    with student.teacher():
        assert torch.equal(predict(denoiser), before)
    assert torch.equal(predict(denoiser), after)
    now = {key: value.data_ptr() for key, value in denoiser.unet.named_parameters()}
    frozen = storage.keys() - {site.key for site in sites}
    assert len(frozen) > 20
    assert all(now[key] == storage[key] for key in frozen)
    assert student.drift() > 0
    deltas = student.deltas()
    assert set(deltas) == set(sites)
    assert all(isinstance(delta, LowRank if rank else Dense) for delta in deltas.values())
    # The edit on the base is the student.
    merged = Denoiser(base.with_edit(Edit(deltas, "hand", ("star",), "")), Context())
    assert float((predict(merged) - after).norm()) < 1e-3 * float((after - before).norm())


def test_only_the_sites_get_gradients_and_recomputed_activations_give_the_same(base: Model) -> None:
    gradients = []
    for checkpointing in (False, True):
        own = Denoiser(base, Context())
        student = Student({"unet": own.unet}, base.select("self", ("q",)))
        if checkpointing:
            own.unet.enable_gradient_checkpointing()
        for value in student.parameters.values():
            value.requires_grad_(True)
        latents = own.draw([0, 1])
        with student.teacher():
            prediction = own.predict(latents, torch.tensor([700, 20]), own.states(["a star", ""]))
        assert not prediction.requires_grad
        own.predict(latents, torch.tensor([700, 20]), own.states(["a star", ""])).square().mean().backward()
        with_grad = {key for key, value in own.unet.named_parameters() if value.grad is not None}
        assert with_grad == {site.key for site in student.sites}
        gradients.append([value.grad for value in student.parameters.values()])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*gradients, strict=True))


def test_sites_without_a_matrix_cannot_be_trained_with_a_rank(base: Model, denoiser: Denoiser) -> None:
    biases = [site for site in base.parameters if site.key.endswith("to_out.0.bias")]
    with pytest.raises(ErasecError, match="nothing to train"):
        Student({"unet": denoiser.unet}, biases, rank=4)
