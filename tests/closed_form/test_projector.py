"""The projector without an inverse: what it removes, what it keeps, and what no attacker of one text state reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasec.closed_form import projector, solver
from erasec.closed_form.reach import RADII, nearest, site_sums
from erasec.closed_form.solver import Solution, System, weighted_system
from erasec.errors import ErasecError

WIDTH, HEADS = 24, 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCALES = torch.linspace(-1, 1, WIDTH, dtype=torch.float64).exp()
WEIGHTS = [draw(site, 30, WIDTH) * SCALES for site in range(3)]
ERASED, GOALS, KEPT, NEUTRAL = draw(10, 6, WIDTH), draw(11, 6, WIDTH), draw(12, 9, WIDTH), draw(13, 6, WIDTH)
METRIC = projector.metric_root(WEIGHTS)
DIFFERENCE = projector.difference_root(ERASED, NEUTRAL)


def system() -> System:
    return weighted_system(ERASED, GOALS, torch.ones(6), KEPT, torch.ones(9))


def solve(keep: float = 0.3, ridge: float | None = 1e-3, count: int = 2) -> Solution:
    return projector.project(system(), projector.directions(DIFFERENCE, count), METRIC, keep, ridge)


def outputs(states: Tensor) -> Tensor:
    """The outputs of all sites, up to a rotation."""
    return states @ METRIC.T


def test_the_metric_is_the_sum_over_the_sites() -> None:
    total = sum(weight.T @ weight for weight in WEIGHTS)
    assert isinstance(total, Tensor)
    regular = projector.REGULAR * total.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    assert torch.allclose(METRIC.T @ METRIC, total + regular, rtol=1e-12)


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_it_removes_its_functionals_and_applying_it_twice_changes_nothing(ridge: float | None) -> None:
    solution = solve(ridge=ridge)
    matrix = solution.matrix()
    assert float((solution.right @ matrix).abs().max()) < 1e-10 * float(solution.right.abs().max())
    assert torch.allclose(matrix @ matrix, matrix, atol=1e-10)
    assert torch.linalg.matrix_rank(matrix) == WIDTH - 2


def test_without_a_guide_it_is_an_orthogonal_projector_of_the_outputs() -> None:
    matrix = solve(ridge=None).matrix()
    rotated = METRIC @ matrix @ torch.linalg.inv(METRIC)
    assert torch.allclose(rotated, rotated.T, atol=1e-10)
    assert float(torch.linalg.matrix_norm(rotated, 2)) == pytest.approx(1.0, abs=1e-10)


def test_of_all_maps_without_the_functionals_it_changes_the_outputs_least() -> None:
    solution = solve(ridge=None)
    matrix, unit = solution.matrix(), torch.eye(WIDTH, dtype=torch.float64)
    least = float((METRIC @ (matrix - unit)).norm())
    for seed in range(20):
        other = matrix + 0.1 * matrix @ draw(seed, WIDTH, WIDTH)  # its functionals are 0 too
        assert float((solution.right @ other).abs().max()) < 1e-9
        assert float((METRIC @ (other - unit)).norm()) > least


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_no_text_state_comes_nearer_to_the_concept_than_its_projection(ridge: float | None) -> None:
    """The nearest reachable output is that of the plain projection, whatever the size of the text state: an inverse or
    a search in text states gains nothing (the residual R(r) is flat)."""
    plain, matrix = solve(ridge=None).matrix(), solve(ridge=ridge).matrix()
    concept = ERASED[0] - NEUTRAL[0]
    found = torch.linalg.lstsq(METRIC @ matrix, METRIC @ concept, driver="gelsd").solution
    nearest = float((METRIC @ (matrix @ found - concept)).norm())
    assert nearest == pytest.approx(float((METRIC @ (plain @ concept - concept)).norm()), rel=1e-8)
    assert nearest > 0.3 * float((METRIC @ concept).norm())
    # The negative control: an invertible map lets the concept through whole.
    invertible = torch.eye(WIDTH, dtype=torch.float64) + 0.3 * draw(30, WIDTH, WIDTH)
    found = torch.linalg.solve(METRIC @ invertible, METRIC @ concept)
    assert float((METRIC @ (invertible @ found - concept)).norm()) < 1e-8


def test_the_residual_is_flat_and_that_of_the_formula() -> None:
    """At every radius it is |f^T c| / sqrt(f^T S^-1 f) for the one functional f. With a guide the concept starts
    farther away and comes no nearer than that; a map of rows lets it come nearer and nearer."""
    metric = torch.linalg.cholesky(sum((w.T @ w for w in WEIGHTS), torch.zeros(WIDTH, WIDTH)), upper=True)
    concept, removed = ERASED - NEUTRAL, projector.directions(DIFFERENCE, 1)

    def energies(solution: Solution) -> Tensor:
        return nearest(site_sums((weight, weight @ solution.matrix()) for weight in WEIGHTS), concept, RADII)

    plain, guided = (projector.project(system(), removed, metric, 0.3, ridge) for ridge in (None, 1e-3))
    f = plain.right[0]
    floor = (concept @ f).square() / (f @ torch.cholesky_solve(f[:, None], metric, upper=True)[:, 0])
    assert torch.allclose(energies(plain), floor.expand(len(RADII), -1), rtol=1e-6)
    assert bool((energies(guided) >= floor * (1 - 1e-9)).all())
    assert torch.allclose(energies(guided)[-1], floor, rtol=1e-6)
    rows = energies(solver.solve(system(), 1e-3))
    assert float(rows[-1].sum()) < 0.3 * float(floor.sum()) < 0.3 * float(rows[0].sum())


@pytest.mark.parametrize("seed", range(4))
def test_at_the_same_drift_of_neighbours_it_leaves_an_attacker_farther_away_than_a_map_of_rows(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    own, middle = noise(2, WIDTH), noise(1, WIDTH)
    keep = middle + 0.7 * noise(12, WIDTH)
    neighbours = keep.repeat(3, 1) + 0.3 * noise(36, WIDTH)
    neutral = middle + 0.2 * noise(6, WIDTH)
    concept = neutral + (1 + 0.3 * noise(6, 2)) @ own
    rows = weighted_system(concept, neutral, torch.full((6,), 1 / 6), keep, torch.full((12,), 1 / 12))
    removed = projector.directions(projector.difference_root(concept, neutral), 2)

    def measured(solution: Solution) -> tuple[float, float]:
        """The drift of neighbours, and R(1)."""
        matrix = solution.matrix()
        sums = site_sums((weight, weight @ matrix) for weight in WEIGHTS)
        drift = outputs(neighbours @ matrix.T - neighbours).norm() / outputs(neighbours).norm()
        return float(drift), float((nearest(sums, concept, (1.0,)).sum()).sqrt() / outputs(concept - neutral).norm())

    projected, mapped = (
        measured(projector.project(rows, removed, METRIC, 30.0, None)),
        measured(solver.solve(rows, 1e-3)),
    )
    assert projected[0] <= mapped[0]
    assert projected[1] > mapped[1] + 0.05


def test_a_larger_keep_weight_changes_kept_states_less() -> None:
    drifts = [
        float(outputs(KEPT @ (solve(keep=keep, ridge=None).matrix().T) - KEPT).norm()) for keep in (0.0, 0.3, 30.0)
    ]
    assert drifts[0] > drifts[1] > drifts[2]
    assert drifts[2] < 0.2 * drifts[0]


def test_the_guide_leads_to_the_goals_and_leaves_kept_states() -> None:
    plain, guided = solve(ridge=None).matrix(), solve().matrix()

    def gap(matrix: Tensor) -> float:
        return float(outputs((ERASED @ matrix.T) - GOALS @ plain.T).norm())

    assert gap(guided) < gap(plain)
    # The least-squares solution: a small change of the guide in any direction is no better for the whole system.
    solution, rows = solve(ridge=0.0), system()
    guide = solution.left - solve(ridge=None).left
    project = plain

    def objective(extra: Tensor) -> float:
        matrix = project + project @ (guide + extra) @ solution.right
        erased = (rows.source @ (matrix - project).T - rows.shift @ project.T).norm() ** 2
        return float(erased + (rows.keep @ (matrix - project).T).norm() ** 2)

    best = objective(torch.zeros_like(guide))
    assert all(objective(project @ (1e-3 * draw(seed, *guide.shape))) >= best for seed in range(10))


def test_dependent_directions_count_once() -> None:
    once = projector.directions(DIFFERENCE, 1)
    twice = torch.cat([once, once])
    one, two = (projector.project(system(), removed, METRIC, 0.3, 1e-3) for removed in (once, twice))
    assert two.left.shape[1] == 1
    assert torch.allclose(one.matrix(), two.matrix(), atol=1e-10)


def test_a_concept_that_is_like_its_kept_phrases_is_refused() -> None:
    nothing = projector.directions(projector.difference_root(ERASED, ERASED), 2)
    with pytest.raises(ErasecError, match="no direction to remove") as caught:
        projector.project(system(), nothing, METRIC, 0.3, None)
    assert "other keep phrases" in caught.value.fix


def test_roots_of_differences_keep_the_directions() -> None:
    many, neutral = draw(40, 100, WIDTH), draw(41, 100, WIDTH)
    root = projector.difference_root(many, neutral)
    assert root.shape == (WIDTH, WIDTH)
    assert float(root.norm()) == pytest.approx(1.0)
    expected = torch.linalg.svd(many - neutral, full_matrices=False)[2][:3]
    assert torch.allclose((projector.directions(root, 3) @ expected.T).abs(), torch.eye(3, dtype=torch.float64))
    assert len(projector.directions(DIFFERENCE[:1], 5)) == 1


def test_outputs_of_each_head_lose_the_directions_of_the_concept() -> None:
    weight = WEIGHTS[0]
    solution = solve()
    edited = weight @ solution.matrix()
    taken = projector.output_directions(weight, DIFFERENCE, KEPT, HEADS, 2, 0.3)
    assert taken.shape == (HEADS, 10, 2)
    assert torch.allclose(taken.mT @ taken, torch.eye(2, dtype=torch.float64).expand(HEADS, 2, 2), atol=1e-12)
    left, right = projector.without_outputs(weight, solution.left, solution.right, taken)
    changed = (weight + left @ right).reshape(HEADS, 10, WIDTH)
    assert float((taken.mT @ changed).abs().max()) < 1e-10
    expected = edited.reshape(HEADS, 10, WIDTH) - taken @ (taken.mT @ edited.reshape(HEADS, 10, WIDTH))
    assert torch.allclose(changed, expected, atol=1e-10)


def test_at_most_a_quarter_of_a_head_is_taken_and_kept_outputs_weigh() -> None:
    weight = WEIGHTS[0]
    assert projector.output_directions(weight, DIFFERENCE, KEPT, HEADS, 50, 0.3).shape == (HEADS, 10, 2)
    assert projector.output_directions(weight, DIFFERENCE, KEPT, 15, 50, 0.3).shape == (15, 2, 1)
    kept = KEPT[:2]  # few: a head has room for directions that these do not use
    losses = []
    for keep in (0.0, 100.0):
        taken = projector.output_directions(weight, DIFFERENCE, kept, HEADS, 2, keep)
        losses.append(float((taken.mT @ (weight.reshape(HEADS, 10, WIDTH) @ kept.T)).norm()))
    assert losses[1] < 0.5 * losses[0]


def test_of_kept_prompts_the_neighbours_of_the_concept_weigh_most() -> None:
    removed = projector.directions(DIFFERENCE, 1)
    states = 0.1 * draw(50, 4, 5, WIDTH)
    states[2] += removed[0]  # a neighbour: it lies along the direction that is removed
    weights = projector.kept_weights(states, removed)
    assert float(weights.sum()) == pytest.approx(1.0)
    by_prompt = weights.reshape(4, 5)
    assert bool((by_prompt == by_prompt[:, :1]).all())
    assert float(by_prompt[2].sum()) > 0.5
    alone = projector.kept_weights(states[:1], removed)  # nothing to compare it with
    assert torch.allclose(alone, torch.full((5,), 0.2, dtype=torch.float64))
