"""Changes after release that are not meant as attacks: edits scaled, text encoders swapped, weights rounded.

Users of a published model merge it, quantise it and exchange its parts. A concept that is only hidden may come back.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from erasec.audit.subject import Subject
from erasec.audit.tracing import moved, scaled
from erasec.base import Attempt, Probe, Role, Threat
from erasec.errors import ErasecError
from erasec.model.edit import Dense, Edit
from erasec.options import options
from erasec.training.denoiser import Denoiser

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.base import Images
    from erasec.family import Site
    from erasec.model.sidecar import Extras
    from erasec.model.view import Model

INT8 = 127  # the largest number of symmetric int8


class Changed(Subject):
    """A subject with another denoiser. The text side is shared with ``origin``, which stays as it is.

    ``name`` tells its digest from that of ``origin``. ``model`` is a view with edits of the denoiser, by default that
    of ``origin``, and ``denoiser`` a network that was changed already.
    """

    def __init__(
        self, origin: Subject, name: str, model: Model | None = None, denoiser: Denoiser | None = None
    ) -> None:
        super().__init__(origin.role, model or origin.model, origin.context)
        self.origin, self.name = origin, name
        self._states, self.texts = origin._states, origin.texts
        if denoiser is not None:
            self.__dict__["denoiser"] = denoiser

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        return hashlib.sha256(f"{self.name} {self.origin.digest}".encode()).hexdigest()

    @cached_property
    def text_encoder(self) -> tuple[Any, Any]:
        return self.origin.text_encoder

    def release(self) -> None:
        """Nothing: a network that was changed in memory cannot be loaded again."""
        return


class Stock(Subject):
    """A subject whose text encoders are those of its folder without tokens and negative prompt."""

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        return hashlib.sha256(f"stock text {self.model.digest} {len(self.model.edits)}".encode()).hexdigest()

    @cached_property
    def extras(self) -> Extras:
        return replace(super().extras, tokens={}, negative="")


def changed_network(subject: Subject, name: str, change: Callable[[str, Tensor], Tensor]) -> Changed:
    """The subject with every parameter of a copy of its denoiser replaced by ``change`` of its name and value."""
    denoiser = Denoiser(subject.model, subject.context)
    network: nn.Module = denoiser.unet
    with torch.no_grad():
        for key, value in network.named_parameters():
            value.copy_(change(key, value))
    return Changed(subject, name, denoiser=denoiser)


def replaced(model: Model, weights: Mapping[Site, Tensor], by: str) -> Model:
    """A view of ``model`` that has these ``weights`` at their sites."""
    deltas = {site: Dense(weight.double() - model.weight(site)) for site, weight in weights.items()}
    return model.with_edit(Edit(deltas, by, (), ""))


def by_name(bench: Bench, subject: Subject, purpose: str, group: str = "name") -> Images:
    """Pictures (n, height, width, 3) of prompts of a group with the settings of the audit."""
    settings, prompts = bench.settings, bench.prompts(group)
    seeds = bench.seeds(f"{purpose} {group}", len(prompts))
    return subject.pictures(prompts, seeds, settings.steps, settings.guidance)


@dataclass(frozen=True)
class Change:
    """A changed subject, by the name of its variant, and numbers of the change itself."""

    variant: str
    subject: Subject
    measured: Mapping[str, float] = field(default_factory=dict)


class ChangedWeights(Probe):
    """A probe that changes the model and then asks for the concept by name; the control asks for other things."""

    threat: ClassVar[Threat] = "training"
    references: ClassVar[tuple[Role, ...]] = ("base", "twin")

    @abstractmethod
    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        """The changed subjects, one for each variant. Raises ErasecError where the change does not apply."""

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        bench.prompts("name")  # before any training: a mark has none
        for change in self.changes(bench, subject):
            yield self._painted(bench, change, "name")
            if subject.role == "model":  # the control needs the same change, which may be a training
                controls = bench.remember((self, "controls"), dict)
                controls[change.variant] = self._painted(bench, change, "keep")
                subject.texts.clear()  # which are not those of the next variant
            del change  # before the next one is made

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        if controls := bench.remember((self, "controls"), dict):
            yield from controls.values()
            return
        for change in self.changes(bench, subject):
            yield self._painted(bench, change, "keep")

    def _painted(self, bench: Bench, change: Change, group: str) -> Attempt:
        pictures = by_name(bench, change.subject, self.name, group)
        return Attempt.single(change.variant, pictures, measured=change.measured)


@options
class Strength(ChangedWeights):
    """The edit made weaker and stronger: W0 + s (W - W0) for s = 0.5 and 1.5, with W0 of the base."""

    name: ClassVar[str] = "strength"
    summary: ClassVar[str] = "the edit at half and at one and a half of its strength"
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = (
        "An attacker who can scale the edit has the base: the rates only say how near the edit is to its limit."
    )

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        for share in (0.5, 1.5):
            # The base has no edit.
            changed = subject if subject.role == "base" else scaled(bench, subject, share)
            yield Change(f"edit times {share:g}", changed)


@options
class TextEncoder(ChangedWeights):
    """The text encoder of the base in place of that of the model, without the tokens and the negative prompt that the
    folder carries: what a user does who loads the denoiser alone."""

    name: ClassVar[str] = "text_encoder"
    summary: ClassVar[str] = "the stock text encoder in place of the model's own"
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = "It tests edits of the text side alone."

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        encoders = subject.model.family.text_encoders
        changes = moved(bench.base.model, subject.model)
        deltas = {site: Dense(-change) for site, change in changes.items() if site.component in encoders}
        extras = subject.extras.kinds & {"tokens", "negative"}
        if subject.role == "model" and not deltas and not extras:
            raise ErasecError(
                "the text encoder is that of the base",
                why="the edit did not change it",
                fix="leave out this probe: there is nothing to put back",
            )
        # A view of its own has text encoders of its own: the tokens of the folder are not added to these.
        stock = replace(subject.model)
        model = stock.with_edit(Edit(deltas, "stock text encoder", (), "")) if deltas else stock
        changed = Stock(subject.role, model, subject.context)
        changed.texts = subject.texts  # the bench takes them there
        yield Change("text encoder of the base", changed)


def round_half(key: str, weight: Tensor) -> Tensor:
    """The weight rounded to float16."""
    return weight.half().to(weight)


def round_int8(key: str, weight: Tensor) -> Tensor:
    """A matrix or kernel rounded to symmetric int8 with one scale for each output channel, the largest absolute value
    of the channel divided by 127: errors are at most half of the scale. Other tensors stay."""
    if weight.dim() < 2:
        return weight
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / INT8
    return ((rows / scale).round() * scale).view_as(weight).to(weight)


@options
class Precision(ChangedWeights):
    """The weights of the denoiser rounded to float16, and to int8 with one scale for each output channel.

    A GPU holds the denoiser in bfloat16, which float16 cannot round further: there int8 alone is measured.
    """

    name: ClassVar[str] = "precision"
    summary: ClassVar[str] = "weights rounded to float16 and to int8"

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        halves = () if subject.denoiser.bfloat16 else (("float16", round_half),)
        for variant, change in (*halves, ("int8", round_int8)):
            yield Change(variant, changed_network(subject, variant, change))
