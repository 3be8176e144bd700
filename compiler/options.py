"""Options of passes, targets and probes: fields with types and ranges, declared once and checked by pydantic.

    @options
    class Mine(Pass):
        strength: Annotated[float, Field(gt=0)] = 1.0
        mode: Literal["fast", "exact"] = "fast"

A plain ``@dataclass(frozen=True)`` works as well. Its options are checked only when they come from a command line or a
recipe, not when Python code creates an instance.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from erasec.errors import ErasecError, suggestion
from erasec.progress import note

T = TypeVar("T")

# Strict: "3" is not converted to 3, nor true to 1. A value of another type is more likely a mistake than intended.
CONFIG = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[str, ...]: "a list of texts",
}
# Class attributes that describe a pass or a target itself. They must not become options of it.
ATTRIBUTES = {
    "pass": frozenset(("name", "version", "paper", "summary", "limits", "when", "extras", "prompt_options", "renamed")),
    "target": frozenset(("name", "summary", "extras", "renamed")),
    "probe": frozenset(
        ("name", "summary", "threat", "paper", "limits", "version", "gradients", "needs_base", "references", "renamed")
    ),
}
# The types of those class attributes that are not text.
ATTRIBUTE_TYPES = {
    "extras": "frozenset[str]",
    "prompt_options": "frozenset[str]",
    "renamed": "Mapping[str, str]",
    "folders": "tuple[str, ...]",
    "gradients": "bool",
    "needs_base": "bool",
    "references": "tuple[Role, ...]",
    "threat": "Threat",
}
# For each bound of pydantic's Field: its attribute, sign and name.
BOUNDS = {
    Ge: ("ge", ">=", "at least"),
    Gt: ("gt", ">", "above"),
    Le: ("le", "<=", "at most"),
    Lt: ("lt", "<", "below"),
}


@dataclass_transform(frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass that checks its fields. A wrong or unknown option raises ErasecError."""
    dataclass = pydantic_dataclass(cls, frozen=True, config=CONFIG)
    validate: Any = dataclass.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            kind, first = type(self), error.errors()[0]
            label, name = str(getattr(kind, "name", kind.__name__)), str(first["loc"][0])
            defaults = {field.name: field.default for field in dataclasses.fields(kind)}
            if name not in defaults:
                raise _unknown_option(label, name, defaults) from error
            hint = get_type_hints(kind, include_extras=True)[name]
            raise _value_error(label, name, first["input"], hint, defaults[name]) from error

    dataclass.__init__ = init  # type: ignore[method-assign]
    return cast("type[T]", dataclass)


def present_names(kind: type, given: Mapping[str, object], label: str) -> dict[str, object]:
    """The options ``given`` under their present names. ``label`` names the pass or target in errors.

    Old option names are accepted and print one line on stderr. Raises ErasecError for an unknown option, or one that is
    given by its old and its present name.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}
    renamed: Mapping[str, str] = getattr(kind, "renamed", {})
    values: dict[str, object] = {}
    for name, value in given.items():
        if name in renamed and name not in known:
            say_renamed(f"{label}: the option {name}", renamed[name])
            name = renamed[name]
        if name not in known:
            raise _unknown_option(label, name, known)
        if name in values:
            raise ErasecError(f"{label}: the option {name} is given twice")
        values[name] = value
    return values


def configure(kind: type[T], given: Mapping[str, object], label: str) -> T:
    """Create a pass or target of the class ``kind`` with the options ``given``. ``label`` names it in errors.

    Old option names are accepted and print one line on stderr. Raises ErasecError for an unknown option, a wrong value,
    or an option that is given by its old and its present name.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = present_names(kind, given, label)
    for name, value in values.items():
        default = known[name].default
        if isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = str(value)  # a command line parses the text option batch=2 as a number
    hints = get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        try:
            values[name] = TypeAdapter(hints[name], config=CONFIG).validate_python(value)
        except ValidationError as error:
            raise _value_error(label, name, value, hints[name], known[name].default) from error
    return kind(**values)


@cache
def say_renamed(old: str, new: str) -> None:
    """Print on stderr that an old name is deprecated. Each name is printed once per process."""
    note(f"{old} is now called {new}; the old name works in this release")


def ranges(kind: type) -> dict[str, str]:
    """The range of each option, such as ">= 1" or "fast|exact"; "" for an option without a range."""
    hints = get_type_hints(kind, include_extras=True)
    texts = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        signs = [f"{sign} {bound:g}" for sign, _, bound in _bounds(hint)]
        texts[field.name] = "|".join(map(str, get_args(hint))) if get_origin(hint) is Literal else ", ".join(signs)
    return texts


def type_text(hint: Any) -> str:
    """The values that an option of this type takes, such as "a whole number, at least 1"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return ", ".join((TYPE_NAMES.get(inner, str(inner)), *(f"{word} {bound:.12g}" for _, word, bound in _bounds(hint))))


def _bounds(hint: Any) -> list[tuple[str, str, float]]:
    """The bounds of an annotated number: sign, name and value of each."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    constraints = [item for extra in extras for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
    return [
        (sign, word, getattr(constraint, key))
        for constraint in constraints
        for kind, (key, sign, word) in BOUNDS.items()
        if isinstance(constraint, kind)
    ]


def _unknown_option(label: str, name: str, known: Iterable[str]) -> ErasecError:
    names = list(known)
    return ErasecError(f"{label} has no option {name!r}", why=suggestion(name, names) if names else "it has no options")


def _value_error(label: str, name: str, value: object, hint: Any, default: object) -> ErasecError:
    """The error for a value that an option does not take."""
    why = f"it takes {type_text(hint)}; by default {default!r}"
    if get_origin(hint) is Literal:
        why = suggestion(str(value), map(str, get_args(hint)))
    return ErasecError(f"{label}: option {name} is {value!r}", why=why)


def check_class(kind: type, required: tuple[str, ...], label: str) -> None:
    """Check that ``kind`` can be used as a "pass", "target", "judge", "probe" or "runtime", which ``label`` says.

    ``required`` are the class attributes that it must have. Raises ErasecError whose ``fix`` is the line to write.
    """
    where = f"{kind.__module__}.{kind.__qualname__}"
    for name in required:
        if not isinstance(getattr(kind, name, None), str | tuple):
            raise ErasecError(
                f"the {label} {kind.__name__} has no {name}",
                where=where,
                why=f"erasec shows the {name} of every {label} in lists and reports",
                fix=f"add this line to the class:   {name}: ClassVar[{ATTRIBUTE_TYPES.get(name, 'str')}] = "
                + ('("...",)' if name == "folders" else '"..."'),
            )
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ErasecError(
            f"the {label} {kind.__name__} does not define {missing[0]}",
            where=where,
            why=f"every {label} must define {', '.join(missing)}",
            fix="add to the class:   " + "; ".join(f"def {name}{_parameters(kind, name)}" for name in missing),
        )
    if label in ATTRIBUTES:
        _check_fields(kind, label, where)


def _check_fields(kind: type, label: str, where: str) -> None:
    """Raise ErasecError if the fields of a pass, target or probe cannot be its options."""
    decorate = "write this line above the class:   @options   (from erasec.options import options)"
    if not dataclasses.is_dataclass(kind):
        raise ErasecError(
            f"the {label} {kind.__name__} is not a dataclass",
            where=where,
            why=f"the options of a {label} are its dataclass fields",
            fix=decorate,
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    own = [name for name, hint in vars(kind).get("__annotations__", {}).items() if "ClassVar" not in str(hint)]
    if attributes := [name for name in (*own, *fields) if name in ATTRIBUTES[label]]:
        name, hint = attributes[0], ATTRIBUTE_TYPES.get(attributes[0], "str")
        raise ErasecError(
            f"the {label} {kind.__name__} would have an option {name}",
            where=where,
            why=f"every field without ClassVar becomes an option, and {name} describes the {label} itself",
            fix=f"write this line instead:   {name}: ClassVar[{hint}] = {getattr(kind, name, None)!r}",
        )
    if undeclared := [name for name in own if name not in fields]:
        raise ErasecError(
            f"the {label} {kind.__name__} has a field {undeclared[0]} that is not an option",
            where=where,
            why="the decorator makes fields into options, and the class itself has no decorator",
            fix=decorate,
        )
    for name, field in fields.items():
        if field.default is dataclasses.MISSING:
            raise ErasecError(
                f"the {label} {kind.__name__}: the option {name} has no default",
                where=where,
                why=f"users may leave out every option of a {label}",
                fix=f"write a default:   {name}: {_annotation(kind, name)} = ...",
            )
        if not isinstance(field.default, bool | int | float | str):
            items = field.default if isinstance(field.default, tuple) else ()
            raise ErasecError(
                f"the {label} {kind.__name__}: the option {name} has a default of the type "
                f"{type(field.default).__name__}",
                where=where,
                why="the values in a command line or a recipe are text, numbers, true and false",
                fix=f'use one of these types, such as   {name}: str = "{",".join(map(str, items)) or "..."}"',
            )


def _annotation(kind: type, name: str) -> str:
    """The annotation of a field as the class has it in its source."""
    annotations = (vars(base).get("__annotations__", {}) for base in kind.__mro__)
    hint = next(own[name] for own in annotations if name in own)
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def _parameters(kind: type, name: str) -> str:
    """The parameters of a method, such as "(self, model, concept)"."""
    method = inspect.getattr_static(kind, name)  # a function, or the object that a decorator put around it
    function = getattr(method, "__func__", getattr(method, "fget", method))
    return f"({', '.join(inspect.signature(function).parameters)})"
