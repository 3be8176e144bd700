"""Presets: options of passes that suit one model or one family of models, by pass and by kind of concept.

A model folder may bring them in the file ``presets.toml``, and a family file in its table ``presets``:

    [default]            # the pass of a build that names none, by kind of concept
    style = "esd"

    [esd]                # options of a pass
    lr = 2e-4

    [esd.style]          # and where every concept of the build is of this kind
    steps = 1000

    ["trce.steer"]       # a name with a dot is written in quotes
    push = 3.0

Presets are data that a stranger may have written: they name registered passes only, and never a Python file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from erasec.documents import read_toml
from erasec.errors import ErasecError, suggestion
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Option, code_file

FILE = "presets.toml"
DEFAULT = "default"
KINDS: tuple[str, ...] = get_args(Concept.model_fields["kind"].annotation)
QUOTES = 'a name with a dot is written in quotes, as in   ["trce.steer"]'


@dataclass(frozen=True)
class Presets:
    """The presets of one model or family.

    ``options`` are the tables of options by pass and kind, where the kind None is the table for all kinds. ``default``
    is the pass of a build that names none, by kind. ``where`` names the file in errors.
    """

    where: str = ""
    default: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str | None, Mapping[str, Option]]] = field(default_factory=dict)

    def of(self, name: str, kind: str | None) -> list[Mapping[str, Option]]:
        """The tables that apply to the pass ``name``, the one for all kinds first.

        ``kind`` is the kind of all concepts of a build, or None if they have several: then only the table for all kinds
        applies.
        """
        tables = self.options.get(name, {})
        return [tables[key] for key in dict.fromkeys((None, kind)) if key in tables]


def read_presets(folder: Path) -> Presets:
    """The presets of a model folder; empty ones if it has no such file. Raises ErasecError that names file and key."""
    path = folder / FILE
    if not path.is_file():
        return Presets()
    return parse_presets(read_toml(path, "the presets of the model"), str(path))


def parse_presets(content: Mapping[str, Any], where: str) -> Presets:
    """Presets from the content of a file, which ``where`` names. Raises ErasecError that names the key at fault.

    Whether passes and options of these names exist is for those to check who may load passes.
    """
    default: dict[str, str] = {}
    options: dict[str, dict[str | None, dict[str, Option]]] = {}
    for name, table in content.items():
        if not isinstance(table, Mapping):
            raise _error(name, f"{table!r} is no table; options are written below   [PASS]", where)
        if name == DEFAULT:
            default = {_kind(kind, DEFAULT, where): _pass_name(value, kind, where) for kind, value in table.items()}
            continue
        tables = options.setdefault(_pass_name(name, name, where), {})
        for key, value in table.items():
            if isinstance(value, Mapping):
                values = tables.setdefault(_kind(key, name, where), {})
                values |= {option: _value(item, f"{name}.{key}.{option}", where) for option, item in value.items()}
            else:
                tables.setdefault(None, {})[key] = _value(value, f"{name}.{key}", where)
    return Presets(where, default, options)


def _pass_name(name: object, key: str, where: str) -> str:
    """The name of a pass. Raises ErasecError for a class in a Python file: a stranger's presets must run nothing."""
    if not isinstance(name, str):
        raise _error(key, f"{name!r} is no name of a pass", where)
    if code_file(name) is not None:
        raise _error(key, f"it names Python code ({name}), and presets hold nothing that runs", where)
    return name


def _kind(kind: str, table: str, where: str) -> str:
    if kind not in KINDS:
        why = f"there is no kind of this name: {suggestion(kind, filter(None, KINDS))}"
        raise _error(f"{table}.{kind}", why if table == DEFAULT else f"{why}; {QUOTES}", where)
    return kind


def _value(value: object, key: str, where: str) -> Option:
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise _error(key, f"it is {value!r}, and an option is text, a finite number, true or false", where)


def _error(key: str, why: str, where: str) -> ErasecError:
    return ErasecError(f"the presets have a wrong key {key!r}", why=why, where=where)
