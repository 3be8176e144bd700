"""The reach of an attacker of one text state: no attacker within the radius comes nearer to the concept's outputs."""

from __future__ import annotations

import pytest
import torch
from concepts import STAR
from torch import Tensor

from erasec.base import Context
from erasec.closed_form.reach import RADII, nearest, reach, site_sums
from erasec.model.edit import Edit
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.passes.project import Project
from erasec.passes.uce import Uce

WIDTH = 16


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCALES = torch.linspace(-2, 1, WIDTH, dtype=torch.float64).exp()
BEFORE = [draw(site, 12, WIDTH) * SCALES for site in range(3)]
ROWS = draw(20, 4, WIDTH)
REMAP = torch.eye(WIDTH, dtype=torch.float64) - 0.2 * draw(21, WIDTH, 4) @ draw(22, 4, WIDTH) / 4
AFTER = [weight @ REMAP for weight in BEFORE]


def error(after: list[Tensor], state: Tensor, row: Tensor) -> Tensor:
    """sum_l |W'_l x - W_l c|^2 of text states x (n, d) and c (d,)."""
    return torch.stack([(state @ w.T - row @ v.T).square().sum(-1) for v, w in zip(BEFORE, after, strict=True)]).sum(0)


def least(after: list[Tensor], radii: tuple[float, ...] = RADII) -> Tensor:
    return nearest(site_sums(zip(BEFORE, after, strict=True)), ROWS, radii)


def test_no_random_attacker_within_the_radius_comes_nearer() -> None:
    found = least(AFTER)
    for index, radius in enumerate(RADII):
        for number, row in enumerate(ROWS):
            steps = draw(number, 1000, WIDTH) * torch.linspace(0, 1, 1000, dtype=torch.float64)[:, None]
            steps = steps / steps.norm(dim=1, keepdim=True).clamp(min=1e-9) * radius * row.norm()
            assert float(error(AFTER, row + steps, row).min()) >= float(found[index, number]) - 1e-9


@pytest.mark.parametrize("radius", [0.25, 1.0])
def test_an_attacker_with_gradients_reaches_it_and_no_more(radius: float) -> None:
    row, expected = ROWS[0], float(least(AFTER, (radius,))[0, 0])
    rate = 0.5 / float(torch.linalg.eigvalsh(site_sums(zip(BEFORE, AFTER, strict=True)).after)[-1])
    step = previous = torch.zeros(WIDTH, dtype=torch.float64)
    for number in range(3000):  # Nesterov's accelerated gradient, projected into the ball
        ahead = (step + number / (number + 3) * (step - previous)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(error(AFTER, row + ahead, row), ahead)
        moved = ahead.detach() - rate * gradient
        previous, step = step, moved * min(1.0, radius * float(row.norm()) / float(moved.norm()))
    reached = float(error(AFTER, row + step, row))
    assert reached >= expected - 1e-9
    assert reached == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_no_attacker_of_twenty_exceeds_it_and_all_of_them_end_on_the_radius() -> None:
    """Each starts elsewhere in the ball and follows the gradient."""
    radius = 0.25
    sums, rows = site_sums(zip(BEFORE, AFTER, strict=True)), ROWS.repeat(5, 1)
    most, lengths = least(AFTER, (radius,))[0].repeat(5), radius * rows.norm(dim=1)
    step = draw(30, 20, WIDTH)
    step = step / step.norm(dim=1, keepdim=True) * (lengths * torch.linspace(0, 1, 20, dtype=torch.float64))[:, None]
    rate, previous = 0.5 / float(sums.spectrum[0][-1]), step
    for number in range(1500):
        ahead = step + number / (number + 3) * (step - previous)
        gradient = 2 * ((rows + ahead) @ sums.after - rows @ sums.mixed.T)
        moved = ahead - rate * gradient
        previous, step = step, moved * (lengths / moved.norm(dim=1)).clamp(max=1.0)[:, None]
    reached = torch.stack([error(AFTER, row + move, row) for row, move in zip(rows, step, strict=True)])
    assert bool((reached >= most - 1e-9).all())
    assert torch.allclose(reached, most, rtol=1e-3)
    assert torch.allclose(step.norm(dim=1), lengths, rtol=1e-4)
    assert not torch.allclose(least(AFTER, (1.01 * radius,))[0].repeat(5), reached, rtol=1e-3)


def test_it_falls_with_the_radius_and_starts_at_the_edit_itself() -> None:
    found = least(AFTER)
    assert bool((found[1:] <= found[:-1] + 1e-12).all())
    for number, row in enumerate(ROWS):
        assert float(found[0, number]) == pytest.approx(float(error(AFTER, row, row)), rel=1e-9)


def test_with_the_inverse_in_reach_nothing_is_left() -> None:
    assert float(least(AFTER, (1e3,)).max()) < 1e-9 * float(least(AFTER, (0.0,)).max())


def test_of_a_remap_it_falls_and_of_a_projector_it_stays(base: Model) -> None:
    def curve(edit: Edit) -> tuple[float, ...]:
        (found,) = reach(base.with_edit(edit), [STAR])
        assert found.recovered[0] == 0.0
        return found.residual

    remap, projector = (curve(step.solve(base, STAR, Context())) for step in (Uce(), Project(guide=False, heads=0)))
    assert remap[-1] < 0.25 * remap[0]
    assert projector[-1] > 0.9 * projector[0]
    assert projector[-1] > 0.3


def test_edits_of_other_matrices_have_none(base: Model) -> None:
    step = Esd(train="noxattn", steps=1, batch=1, trajectories=1, sample_steps=2)
    edit = step.solve(base, STAR, Context())
    assert reach(base.with_edit(edit), [STAR]) == ()
