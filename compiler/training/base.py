"""The base of passes that train: their options, the training itself, and the edit that it results in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from erasec import registry
from erasec.base import Context, Pass, Work
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.model.edit import Edit
from erasec.options import options

if TYPE_CHECKING:
    from pathlib import Path

    from erasec.family import Family, Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Objective, Run
    from erasec.training.student import Student

MEASURE_EVERY = 25  # steps between two measurements of what searched text states recover
SAMPLED = 16  # prompts that are sampled at once
# What a pass may need of a model's denoiser and text encoders besides that learned passes can run them.
Need = Literal["token states", "one text encoder", "cross-attention", "unconditional"]
# Prefixes of the output head and the time embedding. The published "noxattn" leaves these out as well.
HEADS = (
    *("conv_out.", "conv_norm_out.", "time_embedding."),
    *("proj_out.", "norm_out.", "time_text_embed.timestep_embedder."),  # those of transformers
    "time_text_embed.guidance_embedder.",
)
FIXED = "pos_embed.pos_embed"  # a table of positions, which is no parameter


@options
class Learned(Pass):
    """A pass that trains some tensors.

    It trains for ``steps`` steps, or for ``minutes`` minutes if these are above 0 and over earlier. ``lr`` is the
    learning rate, and ``batch`` the number of latents in each loss. A ``rank`` above 0 trains low-rank changes of the
    matrices, and no other tensors; with 0, whole tensors are trained. ``needs`` are those of ``NEEDS`` without which
    the method has no counterpart.
    """

    needs: ClassVar[tuple[Need, ...]] = ()

    steps: Annotated[int, Field(ge=1)] = 200
    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch: Annotated[int, Field(ge=1)] = 4
    rank: Annotated[int, Field(ge=0)] = 0
    minutes: Annotated[float, Field(ge=0)] = 0.0

    def resume_file(self, model: Model, concept: Concept, context: Context) -> Path | None:
        """The file for the state of an interrupted training; None where the build keeps no such files."""
        folder = context.resume_folder if isinstance(context, TrainingContext) else None
        if folder is None:
            return None
        from erasec.training.loop import fingerprint

        return folder / f"{self.name}-{fingerprint(self, model, concept, context)[:16]}.safetensors"

    def fit(
        self,
        objectives: Sequence[Objective],
        student: Student | None,
        model: Model,
        concept: Concept,
        context: Context,
        **more: Any,
    ) -> Run:
        """Run ``erasec.training.loop.fit`` with the options of this pass. ``more`` are further arguments of it.

        ``student`` is the one whose drift is measured; None where the pass changes no weights.
        """
        from erasec.training.loop import fit

        return fit(
            f"{self.name} {concept.name}",
            objectives,
            steps=self.steps,
            minutes=self.minutes,
            seed=context.seed,
            optimizer=measures_of(context).optimizer,
            resume_file=self.resume_file(model, concept, context),
            drift=student.drift if student else None,
            **more,
        )

    def edit(self, student: Student, run: Run, model: Model, concept: Concept, **more: Any) -> Edit:
        """The student's changes as an edit, with the measurements of the run. ``more`` are further fields of Edit."""
        stats = {**run.stats(), "parameters": float(sum(value.numel() for value in student.parameters.values()))}
        options, concepts = asdict(self), (concept.name,)
        more |= {"stats": stats, "curves": run.curves, "phrases": {concept.name: concept.record}}
        return Edit(student.deltas(), self.name, concepts, model.digest, options, **more)

    def reads(self, model: Model, concept: Concept, count: int) -> Work:
        """The work of encoding ``count`` prompts of a concept, of which none is encoded twice."""
        return Work(prompts=min(count, super().work(model, concept).prompts))

    def training(self, rows: float, calls: float = 1, rest: Work | None = None) -> Work:
        """The work of all steps: each predicts ``rows`` rows with gradients in ``calls`` calls, and does ``rest``."""
        rest = rest or Work()
        every = {item.name: self.steps * getattr(rest, item.name) for item in fields(rest)}
        every |= {"trained_rows": self.steps * rows, "trained_calls": self.steps * calls, "graph_rows": math.ceil(rows)}
        return Work(**every)

    def work(self, model: Model, concept: Concept) -> Work:
        """By default the steps of the training, with one prediction of a batch in each."""
        return self.reads(model, concept, 3 * self.steps * self.batch) + self.training(self.batch)


def sampling(count: int, steps: int, guidance: float, scored: bool = True) -> Work:
    """The work of sampling ``count`` trajectories; where a bank is made of them and they have no guidance, of their
    unconditional predictions as well, for which they are predicted again (``scored``)."""
    rows = count * steps * (1 if guidance == 1 else 2)
    scores = 2 * count * steps if scored and guidance == 1 else 0
    return Work(rows=rows + scores, calls=math.ceil(count / SAMPLED) * rows / count + scores / SAMPLED)


def trainable(
    model: Model, selects: Callable[[Site], bool], rank: int = 0, needs: Sequence[Need] = ()
) -> tuple[Site, ...]:
    """The parameters of the denoiser that ``selects`` is true of; with a ``rank`` above 0 only matrices.

    Raises ErasecError for a family that lacks one of the ``needs`` (see ``check_trainable``).
    """
    check_trainable(model, needs)
    return tuple(
        site
        for site in model.parameters
        if site.component == model.family.denoiser
        and site.key != FIXED
        and selects(site)
        and (not rank or len(site.shape) == 2)
    )


def networks(denoiser: Denoiser) -> Mapping[str, Any]:
    """The networks by component, as ``Student`` takes them, for sites of the denoiser."""
    return {denoiser.model.family.denoiser: denoiser.unet}


def check_trainable(model: Model, needs: Sequence[Need] = ()) -> None:
    """Raise ErasecError for a family whose denoiser cannot be trained, or lacks one of the ``needs`` of a method."""
    if why := _obstacle(model.family, needs):
        fitting = [name for name, step in _learned_passes().items() if not _obstacle(model.family, step.needs)]
        learned = f"{', '.join(fitting)}, or " if fitting else ""
        raise ErasecError(
            f"a model of the family {model.family.name} cannot be trained here",
            why=why,
            fix=f"choose {learned}a closed-form pass: erasec list passes",
        )


def _learned_passes() -> dict[str, type[Learned]]:
    """The registered passes that train, by name."""
    loaded = {name: registry.load_pass(name) for name in sorted(registry.PASSES)}
    return {name: step for name, step in loaded.items() if issubclass(step, Learned)}


def reads_text(site: Site) -> bool:
    """Whether a site is a matrix through which the picture reads text: cross-attention or, in joint attention, the
    queries, keys and values of both streams."""
    return site.attn == "cross" or (site.attn in ("joint", "context") and site.proj in ("q", "k", "v"))


# For each need, whether a family has it, and the sentence that says what the method lacks without it.
NEEDS: dict[Need, tuple[Callable[[Family], bool], str]] = {
    "token states": (
        lambda family: not family.pooled,
        "it works with token states alone, and {title} reads a pooled text state as well",
    ),
    "one text encoder": (
        lambda family: len(family.text_encoders) == 1,
        "its new tokens are rows of one text encoder, and {title} reads several",
    ),
    "cross-attention": (
        lambda family: any(stream.attn == "cross" for stream in family.streams),
        "its keys and values depend on the text alone, and {title} changes those of a text by picture and timestep",
    ),
    "unconditional": (
        lambda family: not family.distilled,
        "its targets lead away from the unconditional prediction, and the distilled guidance of {title} leaves none",
    ),
}


def _obstacle(family: Family, needs: Sequence[Need]) -> str:
    """Why a method with these needs cannot train the denoiser of a family; "" where it can."""
    if not family.trainable:
        titles = [each.title for each in FAMILIES.values() if each.trainable]
        return f"learned passes run the denoisers of {', '.join(titles[:-1])} and {titles[-1]}"
    missing = (reason for has, reason in (NEEDS[need] for need in needs) if not has(family))
    return next(missing, "").format(title=family.title)


def guidance_scale(model: Model, guidance: float) -> float:
    """The scale of classifier-free guidance in trajectories with ``guidance``: 1 where guidance is distilled."""
    return 1.0 if model.family.distilled else guidance


@dataclass(frozen=True)
class Measures:
    """What a training does so that it fits the memory of a device. None of it changes the edit, except by rounding.

    ``rows`` is the micro-batch, the largest number of rows in one call of the denoiser; their activations are computed
    again in the backward pass, one call after another (see ``Denoiser.predict``). With 0, a batch is one call.
    ``checkpointing`` computes the activations of a block again in the backward pass. ``optimizer`` is one of
    ``training.optimizers.OPTIMIZERS``.
    """

    rows: int = 0
    checkpointing: bool = False
    optimizer: str = "adamw"


@dataclass(frozen=True)
class TrainingContext(Context):
    """A context for passes that train. ``resume_folder`` is the folder for the state of interrupted trainings, None
    where none is kept. With ``measures`` None, a training does nothing to save memory except what large models need."""

    resume_folder: Path | None = None
    measures: Measures | None = None


def measures_of(context: Context) -> Measures:
    """The measures of a context; none for a context without."""
    return (context.measures if isinstance(context, TrainingContext) else None) or Measures()
