"""The classes that people extend (Pass, Target, EditTarget, Judge, Probe, Runtime) and what they take and return.

The options of a pass, target or probe are its fields; ``erasec.options`` has the decorator that declares and checks
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from erasec.errors import ErasecError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject
    from erasec.checkpoint.folder import Folder
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.runtime.backends import Components

    Images = NDArray[np.uint8]  # (n, height, width, 3)


# What an attacker has, from the weakest to the strongest: a prompt box; the settings of sampling and the first latents;
# the weights, to compute gradients; the recipe of the edit besides; the means to train or to change the weights.
Threat = Literal["prompt", "sampling", "weights", "recipe", "training"]
# Whose pictures are counted. "control" is the audited model under the random control of the probe.
Role = Literal["model", "control", "base", "twin", "random"]


@dataclass(frozen=True)
class Context:
    """How a build runs: the device, as torch names it, and the seed of every random draw.

    ``side`` is the longest side in pixels of pictures that a UNet is run on; 0 is the size it was trained on.
    ``judges`` are the judges that the recipe names. A pass that needs a judge while it trains must not get the one that
    decides the checks (see ``erasec.selection``).
    """

    device: str = "cpu"
    seed: int = 0
    judges: tuple[str, ...] = ()
    side: int = 0


@dataclass(frozen=True)
class Check:
    """One line of the report.

    ``how`` says how the value was measured: the judge and its digest, prompts, seeds, steps and scheduler; or shapes
    and tolerances. A ``limit`` of None means that the value is reported, not enforced.
    """

    name: str
    value: float
    limit: float | None
    passed: bool
    how: str

    @classmethod
    def at_most(cls, name: str, value: float, limit: float | None, how: str) -> Check:
        """A check that passes if ``value`` is at most ``limit``, or if ``limit`` is None."""
        return cls(name, value, limit, limit is None or value <= limit, how)

    @classmethod
    def count(cls, name: str, faults: Collection[str], how: str) -> Check:
        """A check that passes if there are no ``faults``. Its value is their number, and ``how`` names the first."""
        first = f"; the first is {next(iter(faults))}" if faults else ""
        return cls(name, float(len(faults)), 0.0, not faults, how + first)

    @classmethod
    def files(cls, name: str, out: Path, expected: Collection[str], may: Collection[str] = ()) -> Check:
        """A check that passes if ``out`` holds all files ``expected``, and besides them only such as are in ``may``, or
        in folders that are there, which end with "/"."""
        paths = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
        present = {path.relative_to(out).as_posix() for path in paths}
        folders = tuple(entry for entry in may if entry.endswith("/"))
        more = (file for file in present - {*expected, *may} if not file.startswith(folders))
        faults = sorted(({*expected} - present).union(more))
        return cls.count(name, faults, "files that are missing or that the target does not write")

    @property
    def outcome(self) -> str:
        """One of "failed", "passed" and "reported"; "reported" is a check without a limit."""
        return "failed" if not self.passed else "reported" if self.limit is None else "passed"


@dataclass(frozen=True)
class Artifact:
    """What a target wrote: the name of the target, its folder, and the checks of the files in it.

    ``precision`` is "fp32", "fp16" or "int8", that of the coarsest weights. It sets the tolerances with which the
    pictures of the artifact are compared with torch's.
    """

    target: str
    path: Path
    checks: tuple[Check, ...] = ()
    precision: str = "fp32"


@dataclass(frozen=True)
class Work:
    """What a pass computes for one concept, in calls of networks: estimates of time and memory follow from it.

    ``prompts`` are encoded, and ``trained_prompts`` with a backward pass. ``rows`` are latents that the denoiser
    predicts, in ``calls`` calls, and ``trained_rows`` those with a backward pass, in ``trained_calls`` calls.
    ``graph_rows`` is the largest number of rows whose activations a training step holds at the same time. ``encoded``
    and ``decoded`` are pictures of the VAE.
    """

    prompts: float = 0
    trained_prompts: float = 0
    rows: float = 0
    calls: float = 0
    trained_rows: float = 0
    trained_calls: float = 0
    graph_rows: int = 0
    encoded: float = 0
    decoded: float = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        sums = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)}
        return Work(**{**sums, "graph_rows": max(self.graph_rows, other.graph_rows)})


class Pass(ABC):
    """Computes an edit and writes nothing. Decorate a subclass with ``erasec.options.options``.

    ``extras`` names what the edits carry in addition to changes of weights: any of "memory", "tokens" and "negative".
    Only some targets can hold these. ``prompt_options`` names the options whose values text encoders read: a plan
    refuses a value that is too long for them. ``limits`` is one sentence about what the pass does not do; every report
    shows it. ``when`` says when to use the pass, for ``erasec list passes``. ``renamed`` maps old option names to
    current ones. ``paper`` is the source of the method. Raise ``version`` when the same options begin to give another
    edit.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[str] = "1"
    limits: ClassVar[str] = ""
    when: ClassVar[str] = ""
    extras: ClassVar[frozenset[str]] = frozenset()
    prompt_options: ClassVar[frozenset[str]] = frozenset()
    renamed: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def sites(self, model: Model) -> tuple[Site, ...]:
        """The sites that the pass edits. ``erasec plan`` calls this, so it must not read tensors."""

    @abstractmethod
    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        """The edit that erases ``concept`` from ``model``, which includes the edits before it. Raises ErasecError."""

    def work(self, model: Model, concept: Concept) -> Work:
        """What ``solve`` computes; ``erasec plan`` calls it, so it reads no tensors. By default the prompts of the
        concept are encoded, with their goals, and those of its kept phrases."""
        return Work(prompts=(2 * len(concept.phrases) + len(concept.keep)) * len(concept.templates) + 1)

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """The edits that erase several concepts. By default ``solve`` runs once for each concept, on the model that
        includes the edits before it."""
        for concept in concepts:
            edit = self.solve(model, concept, context)
            model = model.with_edit(edit)
            yield edit

    def notes(self, model: Model, concepts: Sequence[Concept]) -> tuple[str, ...]:
        """Sentences that a plan and a report give before ``concepts`` are erased. Reads no tensors. By default none."""
        return ()

    def checks(self, edit: Edit) -> tuple[Check, ...]:
        """Lines of the report about an edit of this pass; a build fails where one of them does. By default none."""
        return ()


class Output(ABC):
    """One output format of a build; the base of Target and EditTarget. Its fields are its options.

    ``extras`` names what the format can hold in addition to weights: any of "memory", "tokens" and "negative".
    ``renamed`` maps old option names to current ones.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    extras: ClassVar[frozenset[str]] = frozenset()
    renamed: ClassVar[Mapping[str, str]] = {}

    def how_to_undo(self) -> str:
        """How somebody can undo an erasure with what the target writes, as a clause; "" if nobody can. By default "".

        A release leaves out the folders of such targets (see ``recipe.Publish``).
        """
        return ""

    def unread_reason(self) -> str:
        """What of the format cannot be read back, so that ``compare`` does not see it. By default "": nothing."""
        return ""

    def check(self) -> None:
        """Raise MissingTool if a library that the target needs is not installed. By default it needs none."""
        return

    def accept(self, sites: Sequence[Site]) -> None:
        """Raise ErasecError if the format cannot hold a change of one of these sites. By default it can hold any."""
        return

    def size(self, model: Model) -> int:
        """An estimate of the bytes that the target writes. By default the size of all weights in float32."""
        return 4 * sum(map(model.count, model.family.components))

    def cached(self, model: Model) -> int:
        """An estimate of the bytes that the target puts into the cache, after it has written them to TMPDIR."""
        return 0

    def notes(self, model: Model) -> tuple[str, ...]:
        """Sentences about what the format leaves out of ``model``, for the plan and the report. By default none."""
        return ()


class Target(Output):
    """Writes a merged checkpoint in one format. A target does not know which concepts were erased."""

    @abstractmethod
    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Write ``checkpoint`` into ``out``, an existing folder that belongs to this target, and check the result."""

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...] | None:
        """Checks that the weights in ``out``, which ``export`` wrote, are exactly those of ``checkpoint``.

        ``erasec verify`` runs them on a bundle that somebody handed over, so nothing in ``out`` may be trusted or run.
        A check without a limit says what was not compared; ``verify`` then states that the artifact is not verified.
        By default None: the target cannot compare its weights.
        """
        return None


class EditTarget(Output):
    """Writes only the edits, not the rest of the model."""

    def how_to_undo(self) -> str:
        return "anyone who has it and the erased checkpoint can subtract the edit"

    @abstractmethod
    def export(self, model: Model, out: Path, context: Context) -> Artifact:
        """Write the edits of ``model`` into ``out``, an existing folder that belongs to this target, and check it."""

    def compare(self, base: Model, checkpoint: Folder, out: Path) -> tuple[Check, ...] | None:
        """Checks that ``base`` with the edits in ``out`` is ``checkpoint``, tensor by tensor; as ``Target.compare``."""
        return None


@dataclass(frozen=True)
class Question:
    """A picture to generate, and the label to look for in it.

    ``group`` is "name", "synonym", "implicit" or "keep". A ``looked_for`` of "" means that no judge looks for anything
    in the picture. ``colour`` is the colour that the prompt names, "" if it names none.
    """

    group: str
    prompt: str
    seed: int
    looked_for: str
    colour: str = ""


class Judge(ABC):
    """Decides what pictures show. It chooses the prompts that test a concept, and finds labels in pictures.

    There are two kinds. A judge of models knows the pictures of some models (``for_model``). A judge of concepts looks
    at pictures of any model, for concepts whose [judge] table names it (``for_concepts``). Its class attributes ``row``
    and ``settings`` are dataclasses of options, those in that table and those of ``--judge NAME:key=value``, which
    ``erasec.options`` checks. ``erasec.judging.pictures.PictureJudge`` is the base of such judges.
    ``everyday`` says whether its models can paint captions of everyday scenes. A judge of a synthetic world, whose
    models know the words of that world alone, sets it to False.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    row: ClassVar[type | None] = None
    settings: ClassVar[type | None] = None
    everyday: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def for_model(cls, model: Model, tuning: bool = False) -> Judge | None:
        """The judge for pictures of ``model``; None if it cannot judge them.

        With ``tuning``, a second judge, for passes that need one while they train: it must differ from the judge that
        decides the checks of a build. None if there is no second judge.
        """

    @classmethod
    def for_concepts(
        cls, concepts: Sequence[Concept], options: Mapping[str, object] | None = None, explicit: bool = False
    ) -> Judge | None:
        """The judge for pictures of any model that show these concepts; None if it is no judge of concepts.

        ``options`` are those of ``--judge NAME:key=value``. ``explicit`` says that the user named the judge: only then
        may it fetch weights, and look for a concept whose [judge] table does not name it. Raises MissingTool, whose
        ``fix`` is a command, where its library or weights are not here, and ErasecError for an option or a row that it
        does not accept. Reads no weights.
        """
        return None

    @classmethod
    def needs(cls) -> str:
        """The command that makes the judge usable on this machine, "" if it is usable. Loads no library."""
        return ""

    @property
    def title(self) -> str:
        """The name of the judge in checks."""
        return self.name

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 of everything that decides the answers, such as the weights. Every check of the judge shows it."""

    @abstractmethod
    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        """The questions for one concept, ``images`` for each group. If the judge has no label for the concept, only
        questions of the group "keep", or none."""

    @abstractmethod
    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each of ``images`` (n, height, width, 3) shows the label at its index, (n,)."""

    @abstractmethod
    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64] | None:
        """Cosine similarity of each image and its prompt, as in CLIP score (Hessel et al., 2021), (n,). None if the
        judge cannot compare pictures with prompts."""

    def embed(self, images: Images) -> NDArray[np.floating] | None:
        """Embeddings of pictures, (n, d), from which the distance of two sets of pictures is computed, such as CLIP's.

        By default None: the judge has no embeddings.
        """
        return None

    def preview(self, images: Images) -> None:
        """Look at pictures (n, height, width, 3) in advance: a build calls this in a thread of its own, while it paints
        the next ones. Only for judges that remember what they saw, and run on another device. By default nothing."""
        return

    def protocols(self, images: Images, label: str) -> Mapping[str, NDArray[np.int64]]:
        """What published protocols count in each image for the label, (n,), by the name of the protocol and its unit.
        The checks show them beside the judge's own answer. By default none."""
        return {}

    @property
    def compares(self) -> bool:
        """Whether the judge can compare pictures with prompts: whether ``agreement`` is not None. By default it can."""
        return True

    @property
    def locates(self) -> bool:
        """Whether the judge can locate a label: whether its class defines ``boxes``."""
        return type(self).boxes is not Judge.boxes

    def boxes(self, images: Images, label: str) -> NDArray[np.int64]:
        """Boxes around the label in each image, (n, 4): left, top, right, bottom in pixels, the last two exclusive.

        By default raises ErasecError: only some judges can locate a label.
        """
        raise ErasecError(
            f"the judge {self.name} cannot locate a label in a picture",
            why="the pass needs boxes around the concept",
            fix="give the pass pictures with boxes, or use another judge",
        )


@dataclass(frozen=True)
class Attempt:
    """The pictures of one variant of a probe on one subject.

    ``pictures`` are (n, k, height, width, 3): ``k`` pictures for each of n prompts. Where k is above 1, one of them is
    selected by the judge that does not score. ``measured`` are numbers of the attack itself, such as its last loss.
    ``note`` says how the attack went, where that is part of the result. ``plain`` are pictures (n, height, width, 3) of
    the same prompts and seeds before the attack changed the prompts; from them follows the attack success rate.
    """

    variant: str
    pictures: NDArray[np.uint8]
    measured: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    plain: Images | None = None

    @classmethod
    def single(cls, variant: str, images: Images, **more: object) -> Attempt:
        """An attempt with one picture (n, height, width, 3) for each prompt."""
        return cls(variant, images[:, None], **more)  # type: ignore[arg-type]


class Probe(ABC):
    """An attack, or a family of attacks that differ in one setting. Its fields are its options (``erasec.options``).

    ``threat`` is what the attacker has. ``paper`` is the source, ``limits`` one sentence about what the probe cannot
    show. ``gradients`` says that it needs the weights as torch tensors; without, it needs only pictures of prompts, and
    runs on folders of other runtimes as well. ``references`` are the subjects that are attacked besides the model.
    ``needs_base`` says that it uses pictures of the base. Raise ``version`` when the same options begin to give other
    pictures.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    threat: ClassVar[Threat]
    paper: ClassVar[str] = ""
    limits: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    gradients: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False
    references: ClassVar[tuple[Role, ...]] = ("base", "twin", "random")
    renamed: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        """The attack on ``subject``, one attempt for each variant. Raises ErasecError where it does not apply."""

    @abstractmethod
    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        """The random control of each variant: the same number of pictures without what makes the attack an attack."""


class Runtime(ABC):
    """Runs the components of a built folder: ONNX Runtime, for example.

    ``folders`` are the names of the targets whose folders it runs. ``extra`` is the extra of the package erasec that
    installs the library, "" if erasec always installs it. A ``portable`` runtime can run a folder on the machine that
    built it, whatever its hardware; a build then checks the pictures that the runtime generates.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    extra: ClassVar[str] = ""
    portable: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def runs(cls, folder: Path) -> bool:
        """Whether this runtime can run the components in ``folder``. Reads no weights."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, threads: int | None) -> Components:
        """The components of ``folder``; each is loaded when it is first opened.

        A ``threads`` of None leaves the number of threads to the library.
        """
