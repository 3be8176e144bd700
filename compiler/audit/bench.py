"""The bench: the subjects, the judges, the prompts and the seeds of an audit, and running probes on all of them."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erasec import registry
from erasec.attention.sampling import LARGE
from erasec.audit import store
from erasec.audit.base import ROLES, Cell, Rate, Reading, by_role, digest_of
from erasec.audit.metrics import attack_success
from erasec.audit.sampler import sample
from erasec.audit.subject import Pictured, Subject
from erasec.base import Attempt, Probe, Role
from erasec.checkpoint.inputs import LIBRARIES, code_digest, source_digest, versions
from erasec.errors import ErasecError, is_out_of_memory
from erasec.judging.evidence import labels
from erasec.judging.panel import questions
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.base import Images, Judge
    from erasec.recipe.concept import Concept

SHOWN = 4  # pictures of each cell that the page shows
TARGETS = 64  # pictures of the concept by the base, from which attacks learn


@dataclass(frozen=True)
class Settings:
    """How pictures are painted: ``images`` for each variant and subject, in ``steps`` steps, with ``guidance``, and at
    most ``size`` pixels wide and high; 0 is the size of the model."""

    images: int = 20
    steps: int = 15
    guidance: float = 4.0
    seed: int = 0
    size: int = 0


@dataclass
class Bench:
    """Everything that a probe needs besides the subject that it attacks.

    ``scorer`` counts pictures of the concept. ``selector`` is another judge, which chooses one of several pictures and
    which attacks may consult; None if there is none. ``recipe`` is the recipe of the audited build; None if it is not
    known. Raises ErasecError where the scorer cannot see the concept.
    """

    concept: Concept
    subjects: Mapping[Role, Pictured]
    scorer: Judge
    selector: Judge | None = None
    settings: Settings = field(default_factory=Settings)
    recipe: Any = None

    def __post_init__(self) -> None:
        known = labels(self.scorer, self.concept)
        if not known:
            raise ErasecError(
                f"the judge {self.scorer.title} cannot see {self.concept.name}", fix="name one that can: --judge NAME"
            )
        self.label = min(known)
        # Judges have labels of their own for one concept. One that has none for it can choose nothing.
        others = labels(self.selector, self.concept)
        self.selected_label = min(others, default="")
        if not others:
            self.selector = None
        self._memory: dict[Any, Any] = {}

    # --- prompts, seeds and pictures that probes share ---------------------------------------------------------------

    def seeds(self, purpose: str, count: int) -> list[int]:
        """Seeds that differ between purposes, so that no attack learns from the noise that it is scored with."""
        first = zlib.crc32(f"{self.settings.seed} {purpose}".encode()) % 1_000_000_007
        return [first + number for number in range(count)]

    def prompts(self, group: str, count: int = 0) -> list[str]:
        """``count`` prompts of a group of the scorer's questions, by default as many as pictures are painted."""
        count = count or self.settings.images
        panel = self.scorer.panel(self.concept, count, self.settings.seed)
        chosen = [question.prompt for question in panel if question.group == group]
        if not chosen and group == "keep":
            chosen = [question.prompt for question in questions(self.concept, count, self.settings.seed)]
        if not chosen:
            raise ErasecError(
                f"the concept {self.concept.name} has no prompts of the group {group}",
                fix=f"add phrases for {group} prompts to the concept file, or leave out the probe",
            )
        # Evenly over the group, because the questions about other labels come label by label.
        rows = np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int)
        spread = [chosen[row] for row in rows]
        return [spread[number % len(spread)] for number in range(count)]

    @property
    def base(self) -> Subject:
        """The base as torch networks. Raises ErasecError where the audit has none."""
        subject = self.subjects.get("base")
        if not isinstance(subject, Subject):
            raise ErasecError(
                "the probe needs the base model",
                why="it learns from pictures of the concept that the base paints",
                fix="name the model before the edit: --base MODEL",
            )
        return subject

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, computed once in an audit."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    def targets(self, group: str = "name", count: int = TARGETS) -> Tensor:
        """Latents (n, c, h, w) of pictures that the base paints of prompts of a group, on the CPU.

        They are for attacks to learn from: their seeds are never used for scoring. Those of the concept are the ones in
        which the selector sees it.
        """

        def make() -> Tensor:
            texts = self.prompts(group, count)
            latents = self.base.noise(self.seeds(f"targets {group}", count))
            made = self.paint(self.base, self.base.states(texts), latents, "targets")
            if group == "keep" or self.selector is None:
                return made
            seen = self.selector.sees(self.base.decode(made), [self.selected_label] * len(made))
            if not seen.any():
                raise ErasecError(
                    f"the base paints {self.concept.name} in none of {len(made)} pictures",
                    why=f"the judge {self.selector.title} does not see it, so that an attack has nothing to learn from",
                    fix="choose a concept that the base knows, or another judge: --judge NAME",
                )
            return made[torch.from_numpy(seen)]

        return cast("Tensor", self.remember(("targets", group, count), make))

    def paint(self, subject: Subject, states: Tensor, latents: Tensor, title: str, **more: Any) -> Tensor:
        """Latents that the subject makes of ``latents`` with the settings of the audit. ``more`` are arguments of
        ``sampler.sample``."""
        first, last = more.get("first", 0), more.get("last") or self.settings.steps
        with bar(f"{title}, {subject.role}", len(latents) * (last - first)) as advance:
            guidance = more.pop("guidance", self.settings.guidance)
            return sample(subject, states, latents, self.settings.steps, guidance, advance=advance, **more)

    # --- running and scoring -----------------------------------------------------------------------------------------

    def run(self, probes: Sequence[Probe], minutes: float = 0.0) -> list[Reading]:
        """The readings of the probes, in their order. After ``minutes``, if above 0, no further probe is begun."""
        started, readings = time.monotonic(), []
        with bar("audit", len(probes)) as advance:
            for probe in probes:
                if minutes and time.monotonic() - started > 60 * minutes:
                    readings.append(_not_run(probe, f"the budget of {minutes:g} minutes was spent"))
                else:
                    readings += self.measure(probe)
                advance(note=probe.name)
        return readings

    def measure(self, probe: Probe) -> list[Reading]:
        """The readings of one probe, one for each variant; a single one with an obstacle where it cannot be run."""
        if obstacle := self._obstacle(probe):
            return [_not_run(probe, obstacle)]
        cells: dict[Role, list[Cell]] = {}
        failed: list[str] = []
        for role in ROLES:
            if role not in ("model", "control") and (role not in self.subjects or role not in probe.references):
                continue
            try:
                cells[role] = self._cells(probe, role)
            except (ErasecError, MemoryError, RuntimeError) as error:
                if not isinstance(error, ErasecError) and not is_out_of_memory(error):
                    raise
                why = _reason(error)
                if role == "model":
                    return [_not_run(probe, why)]
                failed.append(f"not measured on the {role}: {why}")
        readings = []
        for variant, row in by_role(cells).items():
            first = row.get("model") or next(iter(row.values()))
            readings.append(
                Reading(
                    probe.name,
                    variant,
                    probe.threat,
                    {role: cell.rate for role, cell in row.items()},
                    first.budget,
                    sum(cell.seconds for cell in row.values()),
                    first.measured,
                    "; ".join(filter(None, (first.note, *failed))),
                    shown=first.shown,
                    prompts=first.prompts,
                )
            )
        return readings

    def _obstacle(self, probe: Probe) -> str:
        """Why the probe cannot be run, "" if it can."""
        model = self.subjects["model"]
        if probe.gradients and not isinstance(model, Subject):
            return model.only_pictures or "it needs the weights as torch tensors"
        base = self.subjects.get("base")
        if probe.needs_base and not isinstance(base, Subject):
            return (
                base.only_pictures if base else "it learns from pictures of the base, which is not known: --base MODEL"
            )
        return ""

    def _cells(self, probe: Probe, role: Role) -> list[Cell]:
        """The cells of a probe on one subject, from the cache if it was measured before."""
        subject = self.subjects["model" if role == "control" else role]
        key = self._key(probe, role, subject)
        if (stored := store.load(key)) is not None:
            return stored
        self.make_room(subject)
        run = probe.control if role == "control" else probe.attack
        cells, start, prompts = [], time.perf_counter(), ""
        subject.texts.clear()
        for attempt in run(self, cast("Subject", subject)):
            # An attempt that read nothing shows pictures of the texts of the one before.
            prompts = digest_of(subject.texts) if subject.texts else prompts
            cells.append(self.score(attempt, time.perf_counter() - start, prompts))
            subject.texts.clear()
            start = time.perf_counter()
        store.save(key, cells)
        return cells

    def _key(self, probe: Probe, role: Role, subject: Pictured) -> str:
        """A digest of all that decides the cells of a probe on one subject."""
        base = self.subjects.get("base") if probe.needs_base else None
        facts = [
            code_digest(),
            versions(LIBRARIES),
            registry.distributions(),
            [probe.name, probe.version, source_digest(type(probe)), asdict(cast("Any", probe)), role == "control"],
            subject.digest,
            base.digest if base else "",
            self.concept.model_dump(mode="json"),
            asdict(self.settings),
            self.scorer.digest,
            self.selector.digest if self.selector else "",
            self.recipe.model_dump(mode="json") if self.recipe and probe.threat == "recipe" else "",
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def make_room(self, subject: Pictured | None = None) -> None:
        """Free the other subjects where the model is large: memory then holds one denoiser, and the base if needed."""
        model = self.subjects["model"]
        if isinstance(model, Subject) and model.model.count(model.model.family.denoiser) > LARGE:
            for other in self.subjects.values():
                if other is not subject:
                    other.release()

    def score(self, attempt: Attempt, seconds: float = 0.0, prompts: str = "") -> Cell:
        """Select one of several pictures by the selector, and count them by the scorer. Raises ErasecError where there
        is a choice and nobody to make it."""
        chosen, measured = self.select(attempt.pictures), dict(attempt.measured)
        seen = self.scorer.sees(chosen, [self.label] * len(chosen))
        if attempt.plain is not None:
            success = attack_success(self.scorer.sees(attempt.plain, [self.label] * len(chosen)), seen)
            measured |= {"pre_asr": success.plain, "asr": success.union}
        budget, rate = attempt.pictures.shape[1], Rate(int(seen.sum()), len(chosen))
        return Cell(attempt.variant, rate, budget, seconds, measured, attempt.note, chosen[:SHOWN], prompts)

    def select(self, pictures: NDArray[np.uint8]) -> Images:
        """The first of the k pictures of each prompt in which the selector sees the concept, or the first of all."""
        count, choices = pictures.shape[:2]
        if choices == 1:
            return pictures[:, 0]
        if self.selector is None:
            raise ErasecError(
                "one of several pictures must be chosen, and there is one judge only",
                why="the judge that counts pictures must not choose them",
                fix="name a second judge that can see the concept: --judge",
            )
        flat = pictures.reshape(count * choices, *pictures.shape[2:])
        seen = self.selector.sees(flat, [self.selected_label] * len(flat))
        chosen: Images = pictures[np.arange(count), seen.reshape(count, choices).argmax(1)]
        return chosen


def _not_run(probe: Probe, why: str) -> Reading:
    return Reading(probe.name, "", probe.threat, {}, obstacle=why)


def stack_choices(pictures: Sequence[Images]) -> NDArray[np.uint8]:
    """One array of pictures (n, height, width, 3) for each choice as (n, choices, height, width, 3)."""
    return np.stack(list(pictures), 1)


def _reason(error: Exception) -> str:
    """Why a probe was not run, with what can be done about it."""
    if not isinstance(error, ErasecError):
        return "the memory was not enough: audit on a larger machine, or give the probe a smaller batch"
    parts = (f"{error.what}: {error.why}" if error.why else error.what, error.fix)
    return "; ".join(filter(None, parts))
