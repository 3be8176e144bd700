"""Concepts: what to erase, what it becomes, and what to keep. They are TOML files, or made from a single phrase."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, field_validator

from erasec.documents import read_lines, read_toml
from erasec.errors import ErasecError, suggestion

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# The options of one judge in a concept's [judge] table.
JudgeOption = bool | int | float | str | tuple[str, ...]


class Prompt(NamedTuple):
    """A phrase in a template: the whole ``text``, the text ``upto`` the phrase's end, and the text ``before`` it."""

    text: str
    upto: str
    before: str


# The templates of a concept whose file has none.
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a drawing of a {}", "an image of a {}")
# A concept file with this text is a pattern for many concepts: ``find("celebrity:Ada Example")`` replaces it.
PLACEHOLDER = "<name>"
LIST = ".txt"  # how the file of a list of names ends


class Concept(BaseModel):
    """Phrases that describe a concept to erase. All fields but the name and the phrases are optional.

    ``name`` is what builds and reports call the concept. ``erase`` are its names and ``synonyms`` its other names; all
    of them are erased. ``anchor`` is the phrase that they become. ``counterparts`` (a table in TOML) maps some of them
    to another safe phrase that fits better than the anchor. ``fallback`` are phrases that take the anchor's place, the
    first that stays, where the anchor is erased as well. ``keep`` are phrases whose meaning must not change.
    ``implicit`` are prompts that show the concept without its name; only judges use them. ``kind`` decides which pass a
    build uses that names none. ``templates`` are prompts with one ``{}`` for a phrase. ``scale`` is the concept's
    weight, relative to other concepts that are erased with it and to what is kept. ``label`` is the judge's label for
    the concept. ``judge`` (a table in TOML) says which judges can see the concept in pictures of any model, the best
    first, with their options: ``nudenet = {classes = ["FACE_FEMALE"], at = 0.45}``. ``sources`` are the papers, data
    sets and policies behind the file, and ``notes`` say what it cannot do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Phrase
    erase: Annotated[tuple[Phrase, ...], Field(min_length=1)]
    synonyms: tuple[Phrase, ...] = ()
    anchor: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    counterparts: tuple[tuple[Phrase, Phrase], ...] = ()
    fallback: tuple[Phrase, ...] = ()
    keep: tuple[Phrase, ...] = ()
    implicit: tuple[Phrase, ...] = ()
    templates: Annotated[tuple[Phrase, ...], Field(min_length=1)] = TEMPLATES
    kind: Literal["", "safety", "style", "object", "person", "mark"] = ""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    label: str = ""
    judge: tuple[tuple[Phrase, tuple[tuple[Phrase, JudgeOption], ...]], ...] = ()
    sources: tuple[Phrase, ...] = ()
    notes: str = ""

    @field_validator("counterparts", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        # Pairs instead of a table: they are hashable, and a resolved recipe writes them inside [[concept]] as a list.
        if isinstance(value, Mapping):
            return tuple(value.items())
        if isinstance(value, list):
            return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value)
        return value

    @field_validator("judge", mode="before")
    @classmethod
    def _judge_pairs(cls, value: object) -> object:
        # Pairs instead of tables, for the same reasons. A judge checks its own options: the registry knows it, not a
        # concept.
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple):
            raise ValueError("write a table of judges: nudenet = {at = 0.45}")
        result = []
        for pair in pairs:
            name, options = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (pair, None)
            if not isinstance(options, Mapping | list | tuple):
                raise ValueError(f"{name!r} needs a table of options: {name} = {{}}")
            items = options.items() if isinstance(options, Mapping) else options
            result.append((name, tuple(tuple(item) if isinstance(item, list) else item for item in items)))
        if len({name for name, _ in result}) < len(result):
            raise ValueError("a judge is named twice")
        return tuple(result)

    @field_validator("counterparts")
    @classmethod
    def _of_erased_phrases(
        cls, value: tuple[tuple[str, str], ...], info: ValidationInfo
    ) -> tuple[tuple[str, str], ...]:
        erased = (*info.data.get("erase", ()), *info.data.get("synonyms", ()))
        if unknown := [phrase for phrase, _ in value if phrase not in erased]:
            raise ValueError(f"{unknown[0]!r} is neither in erase nor in synonyms; {suggestion(unknown[0], erased)}")
        return value

    @field_validator("templates")
    @classmethod
    def _one_placeholder(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [template for template in value if template.count("{}") != 1]:
            raise ValueError(f"the template {wrong[0]!r} needs one {{}} for the phrase")
        return value

    def prompts(self, phrases: Iterable[str]) -> list[Prompt]:
        """Every phrase in every template. The article before a phrase is "an" if the phrase begins with a vowel."""
        prompts = []
        for phrase in phrases:
            article = "an {}" if phrase[:1].lower() in set("aeiou") else "a {}"
            for template in self.templates:
                before, after = re.sub(r"\ban? \{\}", article, template).split("{}")
                prompts.append(Prompt(before + phrase + after, before + phrase, before))
        return prompts

    @property
    def phrases(self) -> tuple[str, ...]:
        """All phrases to erase: ``erase``, then ``synonyms``."""
        return (*self.erase, *self.synonyms)

    def goal(self, phrase: str) -> str:
        """The phrase that replaces ``phrase``: its counterpart, else the anchor. "" means the empty prompt."""
        return dict(self.counterparts).get(phrase, self.anchor)

    @property
    def judges(self) -> dict[str, dict[str, JudgeOption]]:
        """The options of each judge in the [judge] table, by name, in the order of the table."""
        return {name: dict(options) for name, options in self.judge}

    @property
    def record(self) -> dict[str, list[str]]:
        """What edits store of the concept: its phrases to "erase" and to "keep", and the "goals" that they become."""
        return {"erase": list(self.phrases), "keep": list(self.keep), "goals": list(self.goals)}

    @property
    def goals(self) -> tuple[str, ...]:
        """Everything that its phrases become, without the empty prompt, in the order of the phrases."""
        return tuple(dict.fromkeys(goal for phrase in self.phrases if (goal := self.goal(phrase))))


LIBRARY = Path(str(resources.files("erasec.recipe"))) / "concepts"


def library(world: str = "") -> dict[str, Path]:
    """The bundled concept files by name: ``GROUP/NAME.toml``, and for a reference world ``worlds/WORLD/NAME.toml``.

    The words of a world have their own meaning there: its file takes the place of one of the same name.
    """
    files = [*sorted(LIBRARY.glob("*/*.toml")), *sorted((LIBRARY / "worlds" / world).glob("*.toml"))]
    return {path.stem: path for path in files}


def worlds() -> list[str]:
    """The names of the reference worlds that have concept files of their own."""
    return sorted(folder.name for folder in (LIBRARY / "worlds").iterdir() if folder.is_dir())


def from_file(path: Path) -> Concept:
    """Read one concept file. Raises ErasecError that names the field at fault."""
    return _validate(read_toml(path, "the concept file"), str(path))


def bundled_file(name: str, world: str = "") -> Path | None:
    """The bundled concept file that ``find`` reads for this name; None if the name is a path or a phrase."""
    if name.endswith(".toml"):
        return None
    return library(world).get(name.partition(":")[0].strip().lower().replace(" ", "-"))


def from_phrase(phrase: str) -> Concept:
    """The concept of a bare phrase, without synonyms, anchor and phrases to keep."""
    return Concept(name=phrase, erase=(phrase,))


def find(name: str, world: str = "") -> Concept:
    """Find a concept by file path or bundled name, or make one from any other phrase, with the standard templates.

    ``world`` is the reference world of the model; "" for a model of none. A value for the placeholder of a file follows
    a colon: "celebrity:Ada Example", "mine.toml:Ada Example". Raises ErasecError for a file that is missing or invalid,
    a missing value, and a value without a placeholder.
    """
    name = name.strip()
    word, colon, value = name.partition(".toml:")
    if colon or name.endswith(".toml"):
        word = word + ".toml" if colon else name
        path: Path | None = Path(word)
    else:
        word, _, value = name.partition(":")
        path = bundled_file(name, world)
    if path is not None:
        return _fill(from_file(path), word.strip(), value.strip(), str(path))
    if not name:
        raise ErasecError("the concept has no name", why="the value of --erase is empty", fix="name what to erase")
    return from_phrase(name)


def listed(name: str) -> list[str]:
    """The names that a name stands for, each of them one for ``find``: the lines of a list, or the name itself.

    "names.txt" is a list of names, and "celebrity:names.txt" one of values for a pattern. Raises ErasecError for a list
    that cannot be read or is empty.
    """
    word, colon, file = name.strip().rpartition(":")
    if not file.endswith(LIST):
        return [name]
    names = read_lines(Path(file.strip()).expanduser(), "names of concepts")
    return [word + colon + line for line in names]


def _fill(concept: Concept, word: str, value: str, where: str) -> Concept:
    """The concept with ``value`` for every placeholder. A kept phrase that equals the value is removed from ``keep``.

    ``word`` is the concept as the user named it. Raises ErasecError for a missing value, and for a value without a
    placeholder.
    """
    text = concept.model_dump_json()
    slug = re.sub(r"\W+", "-", value.lower()).strip("-")
    if PLACEHOLDER not in text:
        if value:
            why = f"none of its phrases contains {PLACEHOLDER}"
            raise ErasecError(
                f"the concept {word!r} takes no value, and was given {value!r}", why, f"--erase {word}", where
            )
        return concept
    if not slug:
        why = f"its phrases contain {PLACEHOLDER}"
        raise ErasecError(f"the concept {word!r} needs a value", why, f'--erase "{word}:Ada Example"', where)
    content = json.loads(text.replace(PLACEHOLDER, json.dumps(value)[1:-1]))
    content["name"] += f"-{slug}"
    content["keep"] = [phrase for phrase in content["keep"] if phrase.casefold() != value.casefold()]
    return _validate(content, where)


def _validate(content: Mapping[str, object], where: str) -> Concept:
    """A concept from the content of a file. Raises ErasecError that names the field at fault."""
    try:
        return Concept.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            why = f"there is no field {field!r}; {suggestion(field, Concept.model_fields)}"
        else:
            why = f"{field}: {first['msg'].removeprefix('Value error, ')}"
        fix = "copy a bundled file: erasec list concepts   shows where they are"
        raise ErasecError("the concept file is not valid", why=why, where=where, fix=fix) from error
