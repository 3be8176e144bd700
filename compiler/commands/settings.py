"""The passes of a build with their options, and where the value of each option comes from.

A flag goes before the recipe, the recipe before the presets of the model, these before the table of the family, and
that before the class of the pass, whose values are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from erasec import registry
from erasec.base import Pass
from erasec.errors import ErasecError, suggestion
from erasec.options import configure, present_names
from erasec.recipe.concept import Concept
from erasec.recipe.presets import Presets, parse_presets, read_presets
from erasec.recipe.recipe import NamedOptions

if TYPE_CHECKING:
    from erasec.family import Family
    from erasec.model.view import Model

Origin = Literal["flag", "recipe", "model", "family", "class"]


@dataclass(frozen=True)
class Defaults:
    """The presets of a model and of its family."""

    model: Presets
    family: Presets

    def pass_of(self, kind: str) -> str:
        """The pass for a concept of ``kind`` in a build that names no pass."""
        return self.model.default.get(kind) or self.family.default.get(kind) or registry.DEFAULTS[kind]


@dataclass(frozen=True)
class Settled:
    """A pass with all of its options, and the origin of each value by option."""

    step: Pass
    origins: Mapping[str, Origin]


def defaults_of(model: Model) -> Defaults:
    """The presets of a model and of its family. Raises ErasecError for presets of the model that are damaged, or name
    passes or options that do not exist."""
    own = read_presets(model.source.root)
    if unknown := sorted({*own.options, *own.default.values()} - (known := registry.passes()).keys()):
        why = f"there is none; {suggestion(unknown[0], known)}"
        raise ErasecError(f"the presets name a pass {unknown[0]!r}", why=why, where=own.where)
    for name, tables in own.options.items():
        for kind, table in tables.items():
            try:
                configure(registry.load_pass(name), table, name)
            except ErasecError as error:
                error.where = error.where or f"{own.where}, [{name}{f'.{kind}' if kind is not None else ''}]"
                raise
    return Defaults(own, family_presets(model.family))


def family_presets(family: Family) -> Presets:
    """The presets in the file of a family. A test holds them to the passes."""
    return parse_presets(family.presets, f"{family.name}.toml, [presets]")


def default_passes(concepts: Sequence[Concept], defaults: Defaults) -> tuple[NamedOptions, ...]:
    """The default pass for these concepts. Raises ErasecError if their kinds have different default passes."""
    by_pass: dict[str, list[str]] = {}
    for concept in concepts:
        names = by_pass.setdefault(defaults.pass_of(concept.kind), [])
        names.append(f"{concept.name} (kind {concept.kind or 'none'})")
    if len(by_pass) > 1:
        why = "; ".join(f"{name} for {', '.join(names)}" for name, names in by_pass.items())
        fix = f"choose one: --pass {next(iter(by_pass))}; or erase them one after the other, in two builds"
        raise ErasecError("the kinds of these concepts have different default passes", why, fix)
    return tuple(NamedOptions(name=name) for name in by_pass)


def reason(name: str, concepts: Sequence[Concept], defaults: Defaults) -> str:
    """Why a pass was chosen, if it is the default for the kinds of all concepts; otherwise ""."""
    if any(defaults.pass_of(concept.kind) != name for concept in concepts):
        return ""
    return f"the default for concepts of kind {', '.join(sorted({concept.kind or 'none' for concept in concepts}))}"


def load(uses: Sequence[NamedOptions]) -> tuple[type[Pass], ...]:
    """The classes of passes. Raises ErasecError for a pass that does not exist, or does not take its options."""
    classes = []
    for number, use in enumerate(uses, 1):
        with _place(number, use.name):
            kind = registry.load_pass(use.name)
            configure(kind, use.options, use.name)
        classes.append(kind)
    return tuple(classes)


def settle(
    uses: Sequence[NamedOptions],
    concepts: Sequence[Concept],
    defaults: Defaults,
    by_flag: bool = False,
    classes: Sequence[type[Pass]] = (),
) -> tuple[Settled, ...]:
    """The passes of a build with the options of all levels. The options of ``uses`` are those of flags (``by_flag``) or
    of the recipe; ``classes`` are their classes, if they were loaded before: a Python file runs once.

    A table for a kind of concept applies if all concepts have that kind. In a build of several kinds, only the tables
    for all kinds do. A pass of a local Python file has no presets.
    """
    kinds = {concept.kind for concept in concepts}
    kind = kinds.pop() if len(kinds) == 1 else None
    settled = []
    for number, (use, cls) in enumerate(zip(uses, classes or load(uses), strict=True), 1):
        values: dict[str, object] = {}
        origins: dict[str, Origin] = {}
        levels: list[tuple[Origin, Mapping[str, object]]] = [
            *(("family", table) for table in defaults.family.of(use.name, kind)),
            *(("model", table) for table in defaults.model.of(use.name, kind)),
            ("flag" if by_flag else "recipe", use.options),
        ]
        for origin, table in levels:
            given = present_names(cls, table, use.name)
            values |= given
            origins |= dict.fromkeys(given, origin)
        with _place(number, use.name):
            step = configure(cls, values, use.name)
        settled.append(Settled(step, {name: origins.get(name, "class") for name in options(step)}))
    return tuple(settled)


@contextmanager
def _place(number: int, name: str) -> Iterator[None]:
    """Errors inside the block say which entry of the recipe is at fault."""
    try:
        yield
    except ErasecError as error:
        error.where = error.where or f"[[pass]] {number} ({name})"
        raise


def options(step: Pass) -> dict[str, Any]:
    """Every option of a pass with its value. All are text, numbers, true or false (see ``options.check_class``)."""
    return asdict(cast("Any", step))
