"""What people extend: a Pass computes an edit, a Target writes an artifact; both are frozen dataclasses of options."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from erasec.checkpoint.safetensors import FLOATS, read_tensor
from erasec.errors import ErasecError, MissingTool, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from erasec.checkpoint.folder import Folder
    from erasec.checkpoint.safetensors import Entry
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


T = TypeVar("T")
NAME_BYTES = 120


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is a variant of: the digest of each of its ``components``, and by "component/key" the digest of
    each of its ``tensors`` that is another one in the variant."""

    components: Mapping[str, str]
    tensors: Mapping[str, str]

    def of(self, component: str) -> tuple[str, ...]:
        """The keys of the component's tensors that are others in the variant."""
        return tuple(key.split("/", 1)[1] for key in self.tensors if key.startswith(f"{component}/"))


@dataclass(frozen=True)
class Context:
    """Where and how a build runs: torch device name, and the seed of everything that draws numbers.

    ``work`` is a folder where long training keeps what it resumes from; None where nothing is to be kept. ``origin`` is
    what the checkpoint that targets write is a variant of, None where that is not told.
    """

    device: str = "cpu"
    seed: int = 0
    work: Path | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Check:
    """One line of the report. ``limit`` is None where the value is told and not judged; ``how`` says how it was
    measured: judge and digest, prompts, seeds, steps, scheduler, or shapes and tolerances."""

    name: str
    value: float
    limit: float | None
    passed: bool
    how: str


@dataclass(frozen=True)
class Artifact:
    """What a target wrote: its folder, and the checks that it made on what it wrote."""

    target: str
    path: Path
    checks: tuple[Check, ...] = ()


class Pass(ABC):
    """Computes an edit, writes nothing. Subclass as a frozen dataclass whose fields, with defaults, are its options.

    ``leaves`` says what its edits may carry beside changes of weights, of "memory", "tokens" and "negative": what only
    some targets can hold.

    ``limits`` is one honest sentence about what it does not do, which stands beside it in every report; ``when`` says
    when to use it, for ``erasec list passes``.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    limits: ClassVar[str] = ""
    when: ClassVar[str] = ""
    leaves: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def sites(self, model: Model) -> tuple[Site, ...]:
        """The sites it would edit, for ``erasec plan``; no tensor is read."""

    @abstractmethod
    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        """The edit that erases ``concept`` from ``model``, earlier edits included. Raises ErasecError."""

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """The edits that erase several concepts; by default one after the other, each on top of those before it."""
        for concept in concepts:
            edit = self.solve(model, concept, context)
            model = model.with_edit(edit)
            yield edit


class Output(ABC):
    """What Target and EditTarget have in common: one format that a build writes, with fields that are its options.

    ``holds`` says what the format can hold beside weights, of "memory", "tokens" and "negative".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    holds: ClassVar[frozenset[str]] = frozenset()

    def check(self) -> None:
        """Raise MissingTool where a library that it needs is not there; by default it needs none."""
        return

    def accept(self, sites: Sequence[Site]) -> None:
        """Raise ErasecError where it cannot hold a change of one of these sites; by default it can hold any."""
        return

    def size(self, model: Model) -> int:
        """About how many bytes it will write; by default all weights in float32."""
        components = (model.source.entries(component) for component in model.family.components)
        return 4 * sum(prod(entry.shape) for entries in components for entry in entries.values())


class Target(Output):
    """Writes a merged checkpoint in one format. It never learns that anything was erased."""

    @abstractmethod
    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Write ``checkpoint`` below ``out`` (a folder of its own) and check what was written."""


class EditTarget(Output):
    """Writes what was changed, and nothing else of the model."""

    @abstractmethod
    def export(self, model: Model, out: Path, context: Context) -> Artifact:
        """Write the edits of ``model`` below ``out`` (a folder of its own) and check what was written."""


def require(what: str, modules: Sequence[str], extra: str) -> None:
    """Raise MissingTool where one of the ``modules`` is not installed, with the extra of erasec that brings them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise MissingTool(f"{what} needs {' and '.join(missing)}", why="not installed",
                          fix=f'pip install "erasec[{extra}]"')  # fmt: skip


def finite(name: str, entries: Mapping[str, Entry]) -> Check:
    """Count the floating tensors on disk that hold a NaN or an infinity; one is read at a time."""
    floats = {key: entry for key, entry in entries.items() if entry.dtype in FLOATS}
    bad = [key for key, entry in floats.items() if not bool(read_tensor(entry).isfinite().all())]
    how = f"tensors with a NaN or an infinity; all {len(floats)} floating tensors read from disk"
    if bad:
        how += f"; the first is {bad[0]}"
    return Check(name, float(len(bad)), 0.0, not bad, how)


def file_name(words: Iterable[str]) -> str:
    """The words as one name of a file or folder, of at most 120 bytes: letters, digits, "_", "." and "-" alone.

    It neither leaves its folder nor is hidden; empty where the words have no letter or digit.
    """
    name = "-".join(filter(None, (re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words)))
    return name.encode()[:NAME_BYTES].decode(errors="ignore").rstrip("-.")


def with_options(kind: type[T], options: Mapping[str, object], label: str) -> T:
    """An instance of a pass or target with ``options``; unknown names and wrong types are errors in words."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if bare := [name for name, field in known.items() if field.default is MISSING]:
        raise ErasecError(
            f"{label}: the option {bare[0]} has no default", why="each field of a pass or target needs one"
        )
    values: dict[str, object] = {}
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) if known else "it has no options"
            raise ErasecError(f"{label} has no option {name!r}", why=hint)
        default = known[name].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, str) and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # as in batch=2, which a command line reads as a number
        if type(value) is not type(default):
            raise ErasecError(
                f"{label}: option {name} is {value!r}",
                why=f"it takes a {type(default).__name__}, by default {default!r}",
            )
        values[name] = value
    return kind(**values)
