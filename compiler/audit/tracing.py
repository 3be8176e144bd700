"""The edit by degrees: prompts that name the concept, on models between the base and the audited one.

Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025, arXiv:2505.17013, on tracing. An edit that lowers
the likelihood of the concept loses it by degrees; one that leads prompts elsewhere leaps to something else. The paper
takes checkpoints of the training of an edit. A finished model has none, so its change of weights is scaled here: a
straight line from the base to the model, which is not the way that training took.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from erasec.audit.subject import Subject
from erasec.base import Attempt, Probe, Role, Threat
from erasec.errors import ErasecError
from erasec.model.edit import Dense, Edit
from erasec.options import options

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.audit.bench import Bench
    from erasec.base import Images
    from erasec.family import Site
    from erasec.model.view import Model


def moved(base: Model, model: Model) -> dict[Site, Tensor]:
    """W' - W0 of every weight of the denoiser and the text encoders that differs, float32, by site.

    Raises ErasecError where the two models do not have the same tensors.
    """
    shapes = [{(site.component, site.key): site.shape for site in view.parameters} for view in (base, model)]
    if shapes[0] != shapes[1]:
        raise ErasecError(
            f"the weights of {model.name} cannot be compared with those of {base.name}",
            why="their tensors have other names or shapes",
            fix="name the model before the edit: --base MODEL",
        )
    edited = {*base.edited_sites, *model.edited_sites}
    components = {site.component for site in model.parameters}
    same = {name for name in components if base.component_digest(name) == model.component_digest(name)}
    changes = {}
    for site in model.parameters:
        unedited = site not in edited
        if unedited and (site.component in same or base.site_digest(site) == model.site_digest(site)):
            continue
        change = (model.weight(site) - base.weight(site)).float()
        if change.any():
            changes[site] = change
    return changes


def scaled(bench: Bench, subject: Subject, share: float) -> Subject:
    """``subject`` with ``share`` of its edit: each weight is W0 + share (W' - W0), where W0 is the base's.

    A share of 0 is the base and 1 is ``subject`` itself; others, also above 1 and below 0, lie on the line through
    both. What the folder of ``subject`` carries besides weights (memories, tokens, a negative prompt) stays as it is,
    and with a share of 0 is all of the edit that is left.
    Raises ErasecError where the audit has no base, or no weight differs from it.
    """
    if share == 1:
        return subject
    base, model = bench.base.model, subject.model
    changes = bench.remember(("moved", subject.digest), lambda: moved(base, model))
    if not changes:
        raise ErasecError(
            f"the weights of the {subject.role} are those of the base",
            why="there is no change of weights that could be scaled",
            fix="leave out this probe, or name the model before the edit: --base MODEL",
        )
    if share == 0 and not subject.extras:
        changed = Subject(subject.role, base, subject.context)  # without the rounding of W' - (W' - W0)
    else:
        deltas = {site: Dense((share - 1) * change) for site, change in changes.items()}
        edit = Edit(deltas, "scaled", (bench.concept.name,), "", {"share": share, "base": base.digest})
        changed = Subject(subject.role, model.with_edit(edit), subject.context)
    changed.texts = subject.texts  # the bench takes them there
    return changed


@options
class Tracing(Probe):
    """Prompts that name the concept, with the edit scaled from nothing to all of it in ``parts`` equal parts. Prompts
    and seeds are the same in all of them. Base and twin have no edit: their pictures stand beside every row. The
    control are prompts of other things with the same scaled edit."""

    parts: Annotated[int, Field(ge=1, le=20)] = 4

    name: ClassVar[str] = "tracing"
    summary: ClassVar[str] = "prompts that name the concept, with a growing share of the edit"
    threat: ClassVar[Threat] = "training"
    paper: ClassVar[str] = "arXiv:2505.17013"
    limits: ClassVar[str] = (
        "A part of the edit shows how the concept goes, not whether it is gone: rows below 100 % are no attacks"
    )
    needs_base: ClassVar[bool] = True
    references: ClassVar[tuple[Role, ...]] = ("base", "twin")

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._curve(bench, subject, "name")

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._curve(bench, subject, "keep")

    def _curve(self, bench: Bench, subject: Subject, group: str) -> Iterator[Attempt]:
        first: Images | None = None
        pictures: Images | None = None
        for part in range(self.parts + 1):
            share = part / self.parts
            if pictures is None or subject.role == "model":
                pictures = self._pictures(bench, subject, share if subject.role == "model" else 1.0, group)
            first = pictures if first is None else first
            # How far the pictures are from those without the edit: a leap is seen even where no judge sees the concept.
            drift = float(np.abs(pictures.astype(np.float32) - first).mean() / 255)
            yield Attempt.single(f"{share:.0%} of the edit", pictures, measured={"share": share, "drift": drift})

    def _pictures(self, bench: Bench, subject: Subject, share: float, group: str) -> Images:
        prompts, settings = bench.prompts(group), bench.settings
        changed = scaled(bench, subject, share)
        if changed is not subject:
            subject.release()  # of a large model, memory holds one denoiser
        pictures = changed.pictures(prompts, bench.seeds("tracing", len(prompts)), settings.steps, settings.guidance)
        if changed is not subject:
            changed.release()
        return pictures
