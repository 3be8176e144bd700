"""Concepts: what is to go, what it becomes, what must stay. Loaded from TOML; a bare word gets templates."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from erasec.errors import ErasecError, nearest

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Prompt(NamedTuple):
    """A phrase in a context: the whole ``text``, and the text ``upto`` the phrase's end."""

    text: str
    upto: str


# Contexts in which a phrase is erased or kept when the concept's file names none.
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a drawing of a {}", "an image of a {}")


class Concept(BaseModel):
    """Prompts that say what to erase; every field but ``name`` and ``erase`` may be left out.

    ``erase`` are the concept's names and ``synonyms`` its other names, both erased; ``anchor`` is the phrase that takes
    their place; ``keep`` are phrases whose meaning must not move; ``implicit`` are prompts that show the concept
    without naming it, used only to judge. ``templates`` are the contexts, each with one ``{}`` for the phrase.
    ``label`` is what a judge calls the concept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Phrase
    erase: Annotated[tuple[Phrase, ...], Field(min_length=1)]
    synonyms: tuple[Phrase, ...] = ()
    anchor: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    keep: tuple[Phrase, ...] = ()
    implicit: tuple[Phrase, ...] = ()
    templates: Annotated[tuple[Phrase, ...], Field(min_length=1)] = TEMPLATES
    label: str = ""
    notes: str = ""

    @field_validator("templates")
    @classmethod
    def _one_gap(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [template for template in value if template.count("{}") != 1]:
            raise ValueError(f"the template {wrong[0]!r} needs one {{}} for the phrase")
        return value

    def prompts(self, phrases: Iterable[str]) -> list[Prompt]:
        """Every phrase in every template; the article before it becomes "a" or "an" as the phrase asks."""
        found = []
        for phrase in phrases:
            article = "an {}" if phrase[:1].lower() in set("aeiou") else "a {}"
            for template in self.templates:
                before, after = re.sub(r"\ban? \{\}", article, template).split("{}")
                found.append(Prompt(before + phrase + after, before + phrase))
        return found

    @property
    def phrases(self) -> tuple[str, ...]:
        """All names to erase: its own, then its synonyms."""
        return (*self.erase, *self.synonyms)


def library() -> dict[str, Path]:
    """The bundled concept files by name; they lie in ``concepts/GROUP/NAME.toml``, one group for each world."""
    root = Path(str(resources.files("erasec"))) / "concepts"
    return {path.stem: path for path in sorted(root.rglob("*.toml"))}


def from_file(path: Path) -> Concept:
    """Read one TOML file. Raises ErasecError that names the field at fault."""
    try:
        return Concept.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ErasecError("the concept file is not TOML", why=str(error), where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            why = f"there is no field {field!r}; {nearest(field, Concept.model_fields)}"
        else:
            why = f"{field}: {first['msg']}"
        fix = "erasec list concepts   shows where the bundled files are, to copy from"
        raise ErasecError("the concept file is not valid", why=why, where=str(path), fix=fix) from error
    except OSError as error:
        raise ErasecError("the concept file cannot be read", why=str(error), where=str(path)) from error


def find(name: str) -> Concept:
    """A concept by file path, by bundled name, or made from a bare word or phrase with the standard templates."""
    if name.endswith(".toml"):
        return from_file(Path(name))
    bundled = library().get(name.strip().lower().replace(" ", "-"))
    if bundled is not None:
        return from_file(bundled)
    if not name.strip():
        raise ErasecError("the concept has no name", why="--erase was given an empty word")
    return Concept(name=name.strip(), erase=(name.strip(),))
