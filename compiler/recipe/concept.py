"""Concepts: what is to go, what it becomes, what must stay. Loaded from TOML; a bare word gets templates."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, field_validator

from erasec.errors import ErasecError, nearest

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Prompt(NamedTuple):
    """A phrase in a context: the whole ``text``, the text ``upto`` the phrase's end, and the text ``before`` it."""

    text: str
    upto: str
    before: str


# Contexts in which a phrase is erased or kept when the concept's file names none.
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a drawing of a {}", "an image of a {}")
# A concept file that holds this is a pattern for many concepts: ``find("celebrity:Ada Example")`` fills it in.
PLACEHOLDER = "<name>"


class Concept(BaseModel):
    """Prompts that say what to erase; every field but ``name`` and ``erase`` may be left out.

    ``erase`` are the concept's names and ``synonyms`` its other names, both erased; ``anchor`` is the phrase that takes
    their place, and ``counterparts`` pairs some of them with a safe phrase of their own that fits the context better
    (a table in TOML). ``keep`` are phrases whose meaning must not move; ``implicit`` are prompts that show the concept
    without naming it, used only to judge. ``templates`` are the contexts, each with one ``{}`` for the phrase.
    ``scale`` weighs the concept against others that are erased with it and against what is kept.
    ``label`` is what a judge calls the concept; ``sources`` are the papers, data sets and policies it was drawn from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Phrase
    erase: Annotated[tuple[Phrase, ...], Field(min_length=1)]
    synonyms: tuple[Phrase, ...] = ()
    anchor: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    counterparts: tuple[tuple[Phrase, Phrase], ...] = ()
    keep: tuple[Phrase, ...] = ()
    implicit: tuple[Phrase, ...] = ()
    templates: Annotated[tuple[Phrase, ...], Field(min_length=1)] = TEMPLATES
    kind: Literal["", "safety", "style", "object", "person", "mark"] = ""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    label: str = ""
    sources: tuple[Phrase, ...] = ()
    notes: str = ""

    @field_validator("counterparts", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        # Pairs, not a table: they hash, and a resolved recipe writes them inside [[concept]] like every other list.
        return tuple(value.items()) if isinstance(value, Mapping) else value

    @field_validator("counterparts")
    @classmethod
    def _of_erased_phrases(
        cls, value: tuple[tuple[str, str], ...], info: ValidationInfo
    ) -> tuple[tuple[str, str], ...]:
        erased = (*info.data.get("erase", ()), *info.data.get("synonyms", ()))
        if strange := [phrase for phrase, _ in value if phrase not in erased]:
            raise ValueError(f"{strange[0]!r} is neither in erase nor in synonyms; {nearest(strange[0], erased)}")
        return value

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
                found.append(Prompt(before + phrase + after, before + phrase, before))
        return found

    @property
    def phrases(self) -> tuple[str, ...]:
        """All names to erase: its own, then its synonyms."""
        return (*self.erase, *self.synonyms)

    def goal(self, phrase: str) -> str:
        """What takes the phrase's place: its counterpart, else the anchor; "" is nothing."""
        return dict(self.counterparts).get(phrase, self.anchor)


def library() -> dict[str, Path]:
    """The bundled concept files by name; they lie in ``concepts/GROUP/NAME.toml``, one group for each world."""
    root = Path(str(resources.files("erasec.recipe"))) / "concepts"
    return {path.stem: path for path in sorted(root.rglob("*.toml"))}


def from_file(path: Path) -> Concept:
    """Read one TOML file. Raises ErasecError that names the field at fault."""
    try:
        return _checked(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ErasecError("the concept file is not TOML", why=str(error), where=str(path)) from error
    except OSError as error:
        raise ErasecError("the concept file cannot be read", why=str(error), where=str(path)) from error


def find(name: str) -> Concept:
    """A concept by file path, by bundled name, or made from a bare word or phrase with the standard templates.

    A file with a placeholder takes what stands after a colon: "celebrity:Ada Example", "mine.toml:Ada Example".
    """
    name = name.strip()
    word, colon, value = name.partition(".toml:")
    if colon or name.endswith(".toml"):
        word = word + ".toml" if colon else name
        path: Path | None = Path(word)
    else:
        word, _, value = name.partition(":")
        path = library().get(word.strip().lower().replace(" ", "-"))
    if path is not None:
        return _filled(from_file(path), word.strip(), value.strip(), str(path))
    if not name:
        raise ErasecError("the concept has no name", why="--erase was given an empty word")
    return Concept(name=name, erase=(name,))


def _filled(concept: Concept, word: str, value: str, where: str) -> Concept:
    """The concept with ``value`` at every placeholder; who is erased is no longer among the kept."""
    text = concept.model_dump_json()
    slug = re.sub(r"\W+", "-", value.lower()).strip("-")
    if PLACEHOLDER not in text:
        if value:
            why = f"no phrase of it holds {PLACEHOLDER}"
            raise ErasecError(
                f"the concept {word!r} takes no value, and was given {value!r}", why, f"--erase {word}", where
            )
        return concept
    if not slug:
        why = f"its phrases hold {PLACEHOLDER}"
        raise ErasecError(f"the concept {word!r} needs a value", why, f'--erase "{word}:Ada Example"', where)
    content = json.loads(text.replace(PLACEHOLDER, json.dumps(value)[1:-1]))
    content["name"] += f"-{slug}"
    content["keep"] = [phrase for phrase in content["keep"] if phrase.casefold() != value.casefold()]
    return _checked(content, where)


def _checked(content: Mapping[str, object], where: str) -> Concept:
    try:
        return Concept.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            why = f"there is no field {field!r}; {nearest(field, Concept.model_fields)}"
        else:
            why = f"{field}: {first['msg'].removeprefix('Value error, ')}"
        fix = "erasec list concepts   shows where the bundled files are, to copy from"
        raise ErasecError("the concept file is not valid", why=why, where=where, fix=fix) from error
