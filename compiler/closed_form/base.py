"""The base class of closed-form passes. A pass chooses which text states become which; one solver does the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from erasec.base import Context, Pass
from erasec.closed_form import priors, solver
from erasec.closed_form.solver import Solution, System
from erasec.closed_form.token_rows import uniform_weights
from erasec.model.edit import Edit, Remap
from erasec.options import options
from erasec.recipe.concept import Concept

if TYPE_CHECKING:
    from torch import Tensor

    Sums = Mapping[str, Tensor]
    from erasec.family import Site
    from erasec.model.view import Model

MANY = 0.04  # concepts for each entry of a text state, from which a note says what they cost


@options
class ClosedForm(Pass):
    """Base class of closed-form passes. All concepts of a build are solved as one system.

    A pass defines ``rows_to_erase``. It may also override ``kept_rows``, ``concept_sums``, ``shared_sums`` and
    ``solve_system``.

    Options that all of them have: ``scale`` weighs the erased rows and ``keep`` the kept rows. Each weight is shared
    out over the rows of its side, so that the result does not depend on the number of prompts. ``ridge`` is the
    regulariser: in units of the mean diagonal of the Gram matrix if ``relative``, else absolute as in the papers.
    ``prior`` is a file written by ``erasec prior``, or "everyday"; the captions it was built from are kept as well,
    with the weight ``prior_weight``. ``matrices`` edits only the keys ("k") or only the values ("v") of
    cross-attention; it has no effect on other matrices. ``routes`` "tokens" leaves the matrix alone that reads the
    pooled text state of sdxl, sd3 and flux, as publications on SDXL do; the concept then still comes through it.

    The published ridges are absolute, so that they mean something else for each number of rows and for text states of
    another size (the norm is about 28 in Stable Diffusion 1). The default is relative for that reason. Its value is
    about that of UCE's 0.5 for one phrase in five templates of Stable Diffusion 1, where some 427 rows have a mean
    diagonal of 436.
    """

    scale: Annotated[float, Field(gt=0)] = 1.0
    keep: Annotated[float, Field(ge=0)] = 1.0
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    relative: bool = True
    prior: str = ""
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    matrices: Literal["kv", "k", "v"] = "kv"
    routes: Literal["all", "tokens"] = "all"

    limits: ClassVar[str] = (
        "It is an invertible map of text states: anyone who has the published weights and the recipe can take it "
        "off. What the denoiser can draw stays in place, so that learned embeddings may bring the concept back. The "
        "command audit tests both."
    )

    @abstractmethod
    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        """The text states to erase (n, d), and the text states (n, d) that they become."""

    def sites(self, model: Model) -> tuple[Site, ...]:
        return tuple(site for sites in model.streams.values() for site in sites if self.chooses(site))

    def chooses(self, site: Site) -> bool:
        """Whether the options ``matrices`` and ``routes`` choose a site."""
        if site.attn == "pooled":
            return self.routes == "all"
        return site.attn != "cross" or site.proj in self.matrices

    def notes(self, model: Model, concepts: Sequence[Concept]) -> tuple[str, ...]:
        """What many concepts cost: one map of text states has as many directions as these have entries."""
        width = min(sites[0].shape[1] for sites in model.streams.values())
        if len(concepts) <= MANY * width:
            return ()
        return (
            f"{self.name} erases {len(concepts)} concepts in one map of text states that are {width} wide, so that "
            "what is kept suffers too: on the emoji world, ten concepts, 5 % of the width, cost a fifth of the other "
            "objects, and fifty two fifths (docs/emoji.md). With keep=2 it was a tenth and a quarter, and "
            "prior=everyday helped besides.",
        )

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        return next(self.solve_all(model, [concept], context))

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """One edit that erases all concepts. It does not depend on their order."""
        sums: dict[str, dict[str, Tensor]] = {"": self.shared_sums(model)}
        phrases = {}
        for concept in without_conflicts(concepts):
            sums[concept.name] = self.concept_sums(model, concept)
            phrases[concept.name] = concept.record
        yield replace(self.edit_from_sums(model.streams, sums, model.digest), phrases=phrases)

    def concept_sums(self, model: Model, concept: Concept) -> dict[str, Tensor]:
        """All that solving needs to know of a concept, as tensors by name: its system for each stream."""
        sums: dict[str, Tensor] = {}
        for stream in model.streams:
            sums |= pack_system(self.concept_system(model, concept, stream).compact(), stream)
        return sums

    def concept_system(self, model: Model, concept: Concept, stream: str) -> System:
        """The system of one concept in one stream."""
        source, target = self.rows_to_erase(model, concept, stream)
        weights = uniform_weights(source, self.scale * concept.scale)
        return solver.weighted_system(source, target, weights, *self.kept_rows(model, concept, stream))

    def kept_rows(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        """Text states that stay (m, d), and their weights (m,): by default all states of the empty prompt and of the
        concept's keep phrases in its templates."""
        texts = ["", *(prompt.text for prompt in concept.prompts(concept.keep))]
        rows = model.encode(texts, stream).states.flatten(0, 1)
        return rows, uniform_weights(rows)

    def shared_sums(self, model: Model) -> dict[str, Tensor]:
        """All that solving needs to know of the model besides the concepts: by default the prior, if one is given."""
        if not self.prior:
            return {}
        return {f"{stream}.prior": priors.read(self.prior, model, stream) for stream in model.streams}

    def edit_from_sums(self, streams: Mapping[str, tuple[Site, ...]], sums: Mapping[str, Sums], base: str) -> Edit:
        """The edit, solved from the sums alone and without the model.

        ``streams`` are the sites by the stream that they read, ``sums`` what ``concept_sums`` returned by concept and
        ``shared_sums`` for "", ``base`` is the digest of the model. Concepts are added in the order of their names, so
        that every order of ``sums`` gives the same bits.
        """

        import torch

        names = sorted(name for name in sums if name)
        deltas: dict[Site, Remap] = {}
        edit_stats: dict[str, float] = {}
        for stream, sites in streams.items():
            system = solver.combine_systems(unpack_system(sums[name], stream) for name in names)
            if (prior := sums.get("", {}).get(f"{stream}.prior")) is not None:
                keep = torch.cat([system.keep, prior * self.prior_weight**0.5])
                system = System(system.source, system.shift, keep, system.lost)
            system = self.with_targets(system, stream, sums)
            solution = self.solve_system(system, stream, sums)
            remap = Remap(*solver.reduce_rank(solution.left, solution.right))
            deltas |= dict.fromkeys(filter(self.chooses, sites), remap)
            prefix = "" if stream == "context" else f"{stream}."
            stats = solver.stats(system, Solution(remap.left, remap.right, solution.ridge, solution.condition))
            stats |= self.further_stats(stream, sums)
            edit_stats |= {f"{prefix}{name}": value for name, value in stats.items()}
        params = asdict(cast("Any", self))
        return Edit(deltas, self.name, tuple(names), base, params, stats=edit_stats, sums=sums)

    def with_targets(self, system: System, stream: str, sums: Mapping[str, Sums]) -> System:
        """The system of one stream with the targets of this pass: by default those of ``rows_to_erase``."""
        return system

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Sums]) -> Solution:
        """The matrix of one stream; ``system`` is that of all concepts, and ``sums`` holds what else a pass has stored
        in them."""
        return solver.solve(system, self.ridge, self.keep, self.relative)

    def further_stats(self, stream: str, sums: Mapping[str, Sums]) -> dict[str, float]:
        """Measurements of the edit of one stream that only this pass has."""
        return {}


def without_conflicts(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts, with keep phrases left out that one of the concepts erases."""
    erased = {phrase.casefold() for concept in concepts for phrase in concept.phrases}
    kept = [tuple(phrase for phrase in concept.keep if phrase.casefold() not in erased) for concept in concepts]
    return [concept.model_copy(update={"keep": keep}) for concept, keep in zip(concepts, kept, strict=True)]


def pack_system(system: System, stream: str) -> dict[str, Tensor]:
    """A system as named tensors for the sums of an edit.

    They are contiguous, as tensors read from a file are: with another memory layout, a build and ``erasec combine``
    would differ in the last bits.
    """

    import torch

    parts = {"source": system.source, "shift": system.shift, "keep": system.keep}
    return {f"{stream}.{key}": value.contiguous() for key, value in parts.items()} | {
        f"{stream}.lost": torch.tensor([system.lost], dtype=torch.float64)
    }


def unpack_system(sums: Sums, stream: str) -> System:
    """The inverse of ``pack_system``."""
    source, shift, keep = (sums[f"{stream}.{key}"] for key in ("source", "shift", "keep"))
    return System(source, shift, keep, float(sums[f"{stream}.lost"]))
