"""How near a text state of an attacker can come to the outputs that a concept had before an edit.

For a text state c of the concept, neutral states n in its place, weights W_l before and W'_l after the edit at the
sites l, and a radius r, the attacker's best text state is

    x = argmin sum_l |W'_l x - W_l c|^2  with  |x - c| <= r |c|,    x - c = (S' + mu I)^-1 (T - S') c,

S' = sum_l W'_l^T W'_l, T = sum_l W'_l^T W_l. The distance falls as mu grows, so that bisection finds mu; one
eigendecomposition of S' serves all rows and radii. With E(r) the least value of the sum,

    residual R(r) = sqrt(E(r) / sum_l |W_l (c - n)|^2)  and  recovered part phi(r) = 1 - sqrt(E(r) / E(0)).

R = 1: no nearer than neutral text; R = 0: the concept's own outputs. This is exact for one row of text states at the
keys and values, and says nothing about pictures: several rows, attention, latents and training are other ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from erasec.closed_form.solver import gram
from erasec.closed_form.token_rows import neutral_rows
from erasec.model.threads import LAPACK, fixed_threads

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

# After its last norm a text encoder gives rows of nearly the same length, which are at most about 1.4 lengths apart.
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
HALVINGS = 60


@dataclass(frozen=True)
class Reach:
    """R and phi at each of ``radii``, in root mean squares over the rows of one concept."""

    concept: str
    radii: tuple[float, ...]
    residual: tuple[float, ...]
    recovered: tuple[float, ...]


@dataclass(frozen=True)
class Sums:
    """Sums over the sites of one stream: before^T before, after^T after and after^T before, (d, d) in float64."""

    before: Tensor
    after: Tensor
    mixed: Tensor

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d,) and eigenvectors (d, d) of ``after``."""
        import torch

        values, vectors = torch.linalg.eigh(self.after)
        return values.clamp(min=0), vectors


@fixed_threads(LAPACK)
def site_sums(pairs: Iterable[tuple[Tensor, Tensor]]) -> Sums:
    """The sums of pairs of weights (d_out, d) before and after the edit."""
    import torch

    totals: list[Tensor] = []
    for before, after in pairs:
        first, second = before.double(), after.double()
        parts = [gram(first), gram(second), second.T @ first]
        totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
    if not totals:
        raise ValueError("a stream without sites")
    assert all(torch.is_tensor(total) for total in totals)
    return Sums(*totals)


@fixed_threads(LAPACK)
def nearest(sums: Sums, rows: Tensor, radii: Sequence[float]) -> Tensor:
    """E(r), (radii, n), for the rows (n, d)."""
    import torch

    rows = rows.double()
    values, vectors = sums.spectrum
    start = rows @ (sums.before - sums.mixed - sums.mixed.T + sums.after)
    at_start = (start * rows).sum(1).clamp(min=0)  # sum_l |(W'_l - W_l) c|^2
    pull = (rows @ (sums.mixed.T - sums.after)) @ vectors  # in the basis of the eigenvectors
    # Along directions that no site reads, a step changes nothing.
    reads = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    pull = pull * reads
    found = []
    for radius in radii:
        length = (radius * rows.norm(dim=1)).square()
        low = torch.full((len(rows), 1), -40.0, dtype=torch.float64)
        high = torch.full((len(rows), 1), 40.0, dtype=torch.float64)
        scale = values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            step = pull / (values + scale * middle.exp())
            too_far = (step.square().sum(1) > length)[:, None]
            low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
        step = pull / (values + scale * high.exp())
        step = step if radius else torch.zeros_like(step)
        found.append((at_start - 2 * (step * pull).sum(1) + (step.square() * values).sum(1)).clamp(min=0))
    return torch.stack(found)


def reach(after: Model, concepts: Sequence[Concept], radii: Sequence[float] = RADII) -> tuple[Reach, ...]:
    """The reach of the last tokens of each concept's phrases in its templates, over all streams, from the original of
    ``after`` to ``after`` with its edits. Pooled states count as well.

    Edits that leave all matrices that read text states as they are have none: the result is then empty.
    """
    import torch

    before = after.original
    edited = {site for edit in after.edits for site in edit.deltas}
    energies = [torch.zeros(len(radii), dtype=torch.float64) for _ in concepts]
    neutral_energies = [0.0 for _ in concepts]
    for stream, sites in before.streams.items():
        if not edited.intersection(sites):
            continue
        sums = site_sums((before.weight(site), after.weight(site)) for site in sites)
        for index, concept in enumerate(concepts):
            for rows, neutral in neutral_rows(before, concept, stream, most=1):
                energies[index] += nearest(sums, rows, radii).sum(1)
                difference = rows.double() - neutral.double()
                neutral_energies[index] += float(((difference @ sums.before) * difference).sum())
    before.release_text_encoders()
    found = []
    for concept, energy, neutral_energy in zip(concepts, energies, neutral_energies, strict=True):
        if neutral_energy:
            residual = (energy / neutral_energy).sqrt()
            recovered = 1 - residual / residual[0].clamp(min=torch.finfo(torch.float64).tiny)
            found.append(Reach(concept.name, tuple(radii), tuple(residual.tolist()), tuple(recovered.tolist())))
    return tuple(found)
