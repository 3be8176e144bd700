"""Edits in the null space of what is kept: W' = W M, where M leaves the kept text states exactly as they are.

With C (n, d) the erased text states, V (n, d) what they become, P the projector on the directions that no kept state
has, s the weights of the erased rows and r a ridge,

    E = (r S^-1 + C P C^T)^-1 C P,     M = I + (V - C)^T E,     M k = k for every kept state k.

r = 0 is Double Projections (arXiv:2604.10032) and r > 0 SPEED (arXiv:2503.07392); without kept states it is UCE. What
is left of a row, C M^T - V = R (C - V) with R = r (r + C P C^T)^-1 at weights of 1, depends on P c alone. The share
|P c|^2 / |c|^2, its energy, says before solving how far a concept can be erased. All matrices are float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from erasec.closed_form import solver
from erasec.closed_form.base import ClosedForm
from erasec.closed_form.solver import Solution, System, gram
from erasec.closed_form.token_rows import erased_rows, goal_prompts, row_pairs
from erasec.model.threads import LAPACK, fixed_threads
from erasec.options import options
from erasec.progress import note

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from erasec.base import Context
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

# Rows that agree to this many decimals are the same text state, encoded in another batch.
DECIMALS = 4
# A concept of which less lies outside what is held is named in a warning.
SCARCE = 0.01
# Without a ridge, directions of the erased rows below this part of the norm of all rows are rounding errors.
CUTOFF = 1e-9


def distinct(rows: Tensor) -> Tensor:
    """The rows (m, d) without repetitions: how often a phrase is kept must not decide what is held."""
    import torch

    rows = rows.double()
    if not len(rows):
        return rows
    _, group = torch.unique(rows.round(decimals=DECIMALS), dim=0, return_inverse=True)
    places = torch.arange(len(rows))
    first = places.new_full((int(group.max()) + 1,), len(rows)).scatter_reduce(0, group, places, "amin")
    return rows[first.sort().values]


@fixed_threads(LAPACK)
def held_directions(keep: Tensor, hold: float) -> Tensor:
    """Orthonormal columns (d, q): the directions that each carry more than the share ``hold`` of the squared lengths of
    the rows ``keep`` (m, d). With ``hold`` = 0 all directions that the rows have."""
    import torch

    if not len(keep):
        return keep.new_zeros((keep.shape[1], 0), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram(keep))
    total = values.clamp(min=0).sum()
    least = max(hold, len(values) * torch.finfo(torch.float64).eps)
    held: Tensor = vectors[:, values > least * total]
    return held


def without(rows: Tensor, held: Tensor) -> Tensor:
    """The rows (n, d) without their part along the orthonormal columns ``held`` (d, q): C P."""
    return rows - (rows @ held) @ held.T


def energy(rows: Tensor, held: Tensor) -> float:
    """The share of the squared lengths of the rows (n, d) outside ``held`` (d, q); 0 if there are no rows.

    It is the same for every root of the rows' Gram matrix.
    """
    whole = float(rows.pow(2).sum())
    return float(without(rows, held).pow(2).sum()) / whole if whole else 0.0


@fixed_threads(LAPACK)
def solve(system: System, held: Tensor, ridge: float, least: float = 0.0) -> Solution:
    """The map M that leaves the directions ``held`` (d, q) as they are; the kept rows of ``system`` are not read.

    ``ridge`` is r, absolute. With 0, M c = v holds to rounding for rows whose parts outside ``held`` are independent,
    and in least squares for others. Directions of these parts are left out that carry no more than the share ``least``
    of the squared lengths of the rows: the map of a small part would be large. A state inside ``held`` is left alone.
    Raises ErasecError where the system is too ill-conditioned for float64.
    """
    import torch

    free = without(system.source, held)
    if not system.shift.any():
        return Solution(system.shift[:0].T, system.source[:0], ridge, 1.0)
    if ridge:
        return solver.solve(System(free, system.shift, free[:0]), ridge, relative=False)
    left, values, right = torch.linalg.svd(free, full_matrices=False)
    used = values > max(CUTOFF, least**0.5) * system.source.norm()
    left, values, right = left[:, used], values[used], right[used]
    condition = float(values[0] / values[-1]) ** 2 if len(values) else 1.0
    # E = (P C^T)^+ = left diag(1 / values) right.
    return Solution(system.shift.T @ (left / values), right, 0.0, condition)


@fixed_threads(LAPACK)
def energy_weights(rows: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Orthonormal directions (d, q) of the rows (n, d), and weights (q,) from 0 to 1 (CURE, arXiv:2505.12677).

    f = a s / ((a - 1) s + 1) with a the ``strength`` and s the share of a direction in the squared lengths of the rows.
    """
    import torch

    values, vectors = torch.linalg.eigh(gram(rows))
    total = values.clamp(min=0).sum()
    used = values > len(values) * torch.finfo(torch.float64).eps * total
    shares = values[used] / total
    weights: Tensor = strength * shares / ((strength - 1) * shares + 1)
    return vectors[:, used], weights


@options
class NullSpace(ClosedForm):
    """Base class of passes that edit in the null space of what is kept.

    Held are, in the concept's templates, the keep phrases and the goals of its phrases, and all states of the empty
    prompt. ``rows`` chooses the text states that are erased and held: "last", the last token of each phrase, or "tail",
    those from there to the end, padding included. ``hold`` is the rule for the rank: a direction is held if it carries
    more than this share of the squared lengths of the kept states, each counted once. More directions held leave fewer
    to erase; the statistics ``energy`` and ``free`` of the edit say how many. ``prior`` is held by the same rule, with
    the weight ``prior_weight`` against the kept states. ``keep`` has no effect: what is held does not move.

    The published rule is a threshold of 0.1 on the mean Gram matrix; for states of Stable Diffusion 1, whose length is
    28, that is a share of 1.3e-4.
    """

    rows: Literal["last", "tail"] = "last"
    hold: Annotated[float, Field(ge=0, lt=1)] = 1e-4

    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased_rows(model, concept, self.rows, stream)

    def kept_rows(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        import torch

        prompts = [*concept.prompts(concept.keep), *goal_prompts(concept, concept.phrases)]
        rows, _ = row_pairs(model, prompts, prompts, self.rows, stream)
        rows = distinct(torch.cat([model.encode([""], stream).states.flatten(0, 1), rows]))
        return rows, torch.ones(len(rows), dtype=torch.float64)

    def kept(self, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The rows (m, d) that are held by the rule, of all concepts and the prior; their squared lengths add up to 1,
        or to 1 plus ``prior_weight``."""
        import torch

        rows = distinct(torch.cat([sums[name][f"{stream}.keep"] for name in sorted(sums) if name]))
        rows = rows / rows.norm().clamp(min=torch.finfo(torch.float64).tiny)
        if (prior := sums.get("", {}).get(f"{stream}.prior")) is not None:
            rows = torch.cat([rows, prior * (self.prior_weight**0.5 / prior.norm())])
        return rows

    def held(self, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Orthonormal columns (d, q) of the directions that no edit may move."""
        return held_directions(self.kept(stream, sums), self.hold)

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """One edit that erases all concepts; stderr says where what is kept leaves fewer directions than there are
        concepts, and names concepts of which it leaves next to nothing."""
        for edit in super().solve_all(model, concepts, context):
            free = min(value for name, value in edit.stats.items() if name.endswith("free"))
            if free < len(edit.concepts):
                note(
                    f"{self.name} holds so much that {free:.0f} directions of the text states are left for "
                    f"{len(edit.concepts)} concepts, so that not all of them can be erased; keep fewer phrases, or "
                    "raise the option hold"
                )
            if min(value for name, value in edit.stats.items() if name.endswith("energy")) < SCARCE:
                for name, share in self._scarce(model, edit):
                    note(
                        f"{name}: only {share:.2%} of its text states lie outside what is held, so it can hardly be "
                        "erased; keep fewer phrases that are like it, or raise the option hold"
                    )
            yield edit

    def _scarce(self, model: Model, edit: Edit) -> Iterator[tuple[str, float]]:
        """The concepts of which less than SCARCE lies outside what is held in some stream, with that share."""
        for stream in model.streams:
            held = self.held(stream, edit.sums)
            shares = ((name, energy(edit.sums[name][f"{stream}.source"], held)) for name in edit.concepts)
            yield from ((name, share) for name, share in shares if share < SCARCE)

    def further_stats(self, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """``energy`` is the least share of a concept's states that lies outside what is held, and so can be erased;
        ``free`` the number of directions that are not held."""
        held = self.held(stream, sums)
        shares = [energy(sums[name][f"{stream}.source"], held) for name in sorted(sums) if name]
        return {"energy": min(shares), "free": float(held.shape[0] - held.shape[1])}
