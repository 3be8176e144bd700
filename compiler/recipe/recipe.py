"""The recipe: all inputs of a build in one TOML file. The flags of a command line are turned into a recipe.

Paths in a recipe (a model folder, concept files, pass files) are relative to the working directory, as in flags.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from erasec.documents import Source, parse_toml, read_toml
from erasec.errors import ErasecError, suggestion
from erasec.recipe.concept import Concept, Phrase, listed

FORMAT = "0.1"
PROMPT_LIMIT = 200  # rows of a prompt or caption file: the least number for which CMMD and KID are measured

Option = bool | int | float | str


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedOptions(_Table):
    """One pass of a build.

    ``name`` is a registered pass, or "file.py:Class". ``options`` are its options; what is left out has the default of
    the pass.
    """

    name: Phrase
    options: dict[str, Option] = {}


class Limits(_Table):
    """The limits of a build's checks, and the number of images that they use.

    ``erased`` and ``implicit``: hit rate after the edit, divided by that before it. ``prompts``: hit rate after the
    edit, for each category of a prompt file. ``kept``: mean loss of hit rate of all other labels; 0.05 is five
    percentage points. ``agreement``: loss of cosine similarity between image and prompt; ``captions``: loss of cosine
    similarity between image and caption. ``drift``: mean absolute change of a pixel, with values in [0, 1]. ``lpips``,
    ``cmmd`` and ``kid``: distances of the pictures before and after the edit (see ``judging.kept``). ``recovered``:
    least hit rate with a key, divided by that of the base. A limit of None is reported, not enforced. ``images`` is the
    number of images for each group of prompts. ``steps`` and ``guidance`` are those of sampling.

    The next four are about pictures that no judge looks at; None leaves each to the device. ``pictures`` is the
    number for each group of prompts, ``picture_steps`` the steps of sampling, ``picture_size`` the longest side in
    pixels, and ``picture_minutes`` the time for all of them. With ``require_judge``, a build that has a concept that no
    judge can see is rejected.
    """

    erased: Annotated[float, Field(ge=0)] = 0.10
    implicit: Annotated[float, Field(ge=0)] | None = None
    kept: Annotated[float, Field(ge=0)] = 0.05
    agreement: Annotated[float, Field(ge=0)] = 0.05
    drift: Annotated[float, Field(ge=0)] = 0.10
    # Published erasures of one concept lower the CLIP score of COCO captions by at most 0.019; one of 100 artists that
    # ruins the model, by 0.12 (Lu et al., 2024, tables 2 and 3).
    captions: Annotated[float, Field(ge=0)] = 0.03
    lpips: Annotated[float, Field(ge=0)] | None = None
    cmmd: Annotated[float, Field(ge=0)] | None = None
    kid: Annotated[float, Field(ge=0)] | None = None
    prompts: Annotated[float, Field(ge=0)] | None = None
    recovered: Annotated[float, Field(ge=0)] = 0.80
    images: Annotated[int, Field(ge=1)] = 16
    steps: Annotated[int, Field(ge=1)] = 15
    guidance: Annotated[float, Field(ge=0)] = 4.0
    pictures: Annotated[int, Field(ge=0)] | None = None
    picture_steps: Annotated[int, Field(ge=1)] | None = None
    picture_size: Annotated[int, Field(ge=64)] | None = None
    picture_minutes: Annotated[float, Field(gt=0)] | None = None
    require_judge: bool = False


class Publish(_Table):
    """Which files that can undo the erasure a release holds. What it does not hold lies in the folder OUT.private.

    ``edits`` are the folders of targets that are written from the edit alone, such as edit and lora. ``keys`` are key
    files, and a model with a key attached. ``refittable`` are engines that can be given other weights.
    """

    edits: bool = False
    keys: bool = False
    refittable: bool = False


class Recipe(_Table):
    """All inputs of a build. The TOML tables [[pass]] and [[concept]] are the fields passes and concepts here.

    ``format`` is the version of the format. ``model`` is a bundled name, an alias, a diffusers
    folder, a single file or a hub id. ``passes`` are run one after another; without any, the kind of the concepts
    decides. ``concepts`` are concepts that are written out in the recipe. ``checks`` are the limits of the checks.
    ``seed`` is that of all random draws. ``device`` is "auto", "cpu", "cuda", "cuda:1" and so on, or "mps".

    ``erase`` are names from ``concepts``, bundled names, concept files or phrases; they are looked up in this order.
    A name that ends in ".txt" is a file with one name per line, and "celebrity:FILE.txt" one with a value per line.
    Each of ``targets`` is NAME or NAME:key=value,... as on the command line. A plan adds the merged checkpoint as the
    first target, because every build writes it. ``keys`` are key files: the built model shows the concepts that they
    restore. If ``absorb`` is above 0, the keys are merged into stock weights as far as possible, and ``absorb`` is the
    largest residual allowed. ``prompts`` are prompt files, ``captions`` is a caption file, and ``prompt_limit`` is the
    largest number of rows of each that is used. ``judge`` is one judge or a list of them, each NAME or
    NAME:key=value,...; "" leaves the choice to the model and the concepts (see ``erasec.selection``). ``revision`` and
    ``digest`` pin the model if they are not empty. ``variant`` selects one of a folder's precisions, such as "fp16".
    ``gate`` are the highest rates of an audit, by probe or PROBE/VARIANT (see ``erasec.audit.gates``).
    A build with the table ``publish`` is a release; one without writes everything into its output folder.
    ``audit`` is the suite of attacks that a build must stand within them; "" for none.
    ``memory`` is what trainings may use, such as "8GB"; "" for what a GPU has free, and without a limit on a CPU. With
    ``allow_pickle``, pickled weights are read, as tensors only. With ``link``, unchanged files become hard links.
    """

    format: Annotated[str, Field(alias="erasec", pattern=r"^\d+\.\d+$")] = FORMAT
    model: Phrase
    revision: str = ""
    digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    variant: str = ""
    allow_pickle: bool = False
    link: bool = False
    erase: tuple[Phrase, ...] = ()
    targets: tuple[Phrase, ...] = ()
    keys: tuple[Phrase, ...] = ()
    absorb: Annotated[float, Field(ge=0)] = 0.0
    judge: str | tuple[Phrase, ...] = ""
    prompts: tuple[Phrase, ...] = ()
    captions: str = ""
    prompt_limit: Annotated[int, Field(ge=1)] = PROMPT_LIMIT
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    memory: Annotated[str, Field(pattern=r"^(\d+(\.\d+)? ?([kMG]i?)?B?)?$")] = ""
    passes: Annotated[tuple[NamedOptions, ...], Field(alias="pass")] = ()
    checks: Limits = Limits()
    audit: Annotated[str, Field(pattern=r"^(quick|standard|full)?$")] = ""
    publish: Publish | None = None
    gate: Mapping[Phrase, Annotated[float, Field(ge=0, le=1)]] = {}
    concepts: Annotated[tuple[Concept, ...], Field(alias="concept")] = ()

    @field_validator("targets", "keys", "prompts")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @property
    def judges(self) -> tuple[str, ...]:
        """The judges that the recipe names, in their order."""
        return tuple(filter(None, (self.judge,))) if isinstance(self.judge, str) else self.judge

    @field_validator("concepts")
    @classmethod
    def _names_differ(cls, value: tuple[Concept, ...]) -> tuple[Concept, ...]:
        names = [concept.name for concept in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two concepts are named {twice[0]!r}")
        return value


def from_file(path: Path, allow_code: bool = False) -> Recipe:
    """Read a recipe file. Raises ErasecError that names the file and the key at fault, and the nearest valid key.

    A recipe that names classes in Python files is refused without ``allow_code``: a build would run them.
    """
    recipe = from_content(read_toml(path, "the recipe"), str(path))
    if not allow_code:
        refuse_code(recipe, str(path))
    return recipe


def code_file(name: str) -> Path | None:
    """The Python file in "file.py:Class", as a pass, target, judge or runtime may be given; else None."""
    file, _, _ = name.rpartition(":")
    return Path(file).expanduser() if file.endswith(".py") else None


def code_files(recipe: Recipe, replaced: Collection[str] = ()) -> list[Path]:
    """The Python files that a recipe names in the keys "pass", "targets" and "judge", without those ``replaced``."""
    names = {
        "pass": [use.name for use in recipe.passes],
        "targets": [parse_named_options(text, "--target").name for text in recipe.targets],
        "judge": [parse_named_options(text, "--judge").name for text in recipe.judges],
    }
    files = (code_file(name) for key in names.keys() - set(replaced) for name in names[key])
    return sorted(file for file in files if file is not None)


def refuse_code(recipe: Recipe, where: str, replaced: Collection[str] = ()) -> None:
    """Raise ErasecError where a recipe names a class in a Python file; see ``code_files``."""
    if files := code_files(recipe, replaced):
        raise ErasecError(
            f"the recipe names Python code: {files[0]}",
            why="a recipe may come from someone else, and this file would run with your rights",
            where=where,
            fix="read the file; then give --allow-code, or name the class by a flag, such as --pass",
        )


def from_toml(text: str, where: str = "") -> Recipe:
    """Read a recipe from TOML. ``where`` names its source in errors. Raises ErasecError as ``from_file`` does."""
    return from_content(parse_toml(text, Source("the recipe", where, "")), where)


def from_flags(
    model: str,
    erase: Sequence[str] = (),
    passes: Sequence[str] = (),
    targets: Sequence[str] = (),
    device: str | None = None,
    seed: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool | None = None,
    link: bool | None = None,
    keys: Sequence[str] = (),
    absorb: float | None = None,
    judge: str | Sequence[str] | None = None,
    gate: bool | None = None,
    pictures: str | None = None,
    prompts: Sequence[str] = (),
    captions: str | None = None,
    prompt_limit: int | None = None,
    memory: str | None = None,
    allow_code: bool = False,
    audit: str | None = None,
    publish: bool | None = None,
) -> Recipe:
    """Make a recipe from the flags of a command line.

    If ``model`` ends in .toml, it is a recipe file, and every flag that is given replaces its key in the recipe.
    ``publish`` makes the build a release: it adds the table [publish]. ``gate`` is the key require_judge of [checks],
    and ``pictures``, as N[:steps=S,size=PIXELS,minutes=M], the keys whose names begin with "picture". Python files that
    the flags name may run; those that the recipe names only with ``allow_code``. Raises ErasecError for an invalid flag
    or file.
    """
    checks: dict[str, Option] = {} if gate is None else {"require_judge": gate}
    checks |= {} if pictures is None else _picture_keys(pictures)
    given: dict[str, Any] = {
        "erase": list(erase),
        "pass": [parse_named_options(text).model_dump() for text in passes],
        "targets": list(targets),
        "device": device,
        "seed": seed,
        "revision": revision,
        "variant": variant,
        "allow_pickle": allow_pickle,
        "link": link,
        "keys": list(keys),
        "absorb": absorb,
        # One judge is written as a plain string, as in recipes by hand.
        "judge": judge if judge is None or isinstance(judge, str) else judge[0] if len(judge) == 1 else list(judge),
        "prompts": list(prompts),
        "captions": captions,
        "prompt_limit": prompt_limit,
        "memory": memory,
        "audit": audit,
    }
    given = {key: value for key, value in given.items() if value is not None and value != []}
    base: dict[str, Any] = {"model": model}
    if model.endswith(".toml"):
        path = Path(model).expanduser()
        recipe = from_file(path, allow_code=True)
        if not allow_code:
            refuse_code(recipe, str(path), replaced=given)
        base = recipe.model_dump(by_alias=True)
    if checks:
        given["checks"] = {**base.get("checks", {}), **checks}
    if publish:
        given["publish"] = base.get("publish") or {}
    return from_content({**base, **given}, "the command line")


def _picture_keys(text: str) -> dict[str, Option]:
    """The keys of [checks] that the value of --pictures stands for. Raises ErasecError for another syntax."""
    use = parse_named_options(text, "--pictures")
    keys = {"steps": "picture_steps", "size": "picture_size", "minutes": "picture_minutes"}
    if not use.name.isdecimal() or not use.options.keys() <= keys.keys():
        raise ErasecError(
            f"--pictures {text} is no number of pictures",
            why="it is written N or N:steps=S,size=PIXELS,minutes=M",
            fix="give one for each group of prompts with --pictures 1, or none with --pictures 0",
        )
    return {"pictures": int(use.name), **{keys[name]: value for name, value in use.options.items()}}


def parse_named_options(text: str, flag: str = "--pass") -> NamedOptions:
    """Parse ``NAME[:key=value,...]``, the value of --pass, --target, --judge or --pictures (``flag``).

    Option values become true, false, integers, floats, or else text. Raises ErasecError for any other syntax.
    """
    match = re.fullmatch(r"(.+?)(?::(\w+=.*))?", text.strip())
    lists = {"--pass": "passes", "--target": "targets", "--judge": "judges"}
    fix = f"erasec list {lists[flag]}   shows names and options" if flag in lists else ""
    if match is None:
        raise ErasecError(f"{flag} has an empty name", fix=fix)
    name, text_of_options = match[1], match[2]
    pieces = text_of_options.split(",") if text_of_options else []
    invalid = [piece for piece in pieces if "=" not in piece]
    before, colon, after = name.rpartition(":")
    if colon and not before.endswith(".py"):
        invalid.append(after)
    if invalid:
        raise ErasecError(
            f"{flag} {text}: {invalid[0]!r} is no option",
            why="options are written NAME:key=value,key=value",
            fix=fix,
        )
    options: dict[str, Option] = {}
    for piece in pieces:
        key, _, value = piece.partition("=")
        if key.strip() in options:
            raise ErasecError(f"{flag} {text}: the option {key.strip()!r} is given twice")
        options[key.strip()] = _literal(value.strip())
    return NamedOptions(name=name, options=options)


def _literal(text: str) -> Option:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return text


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML. Equal recipes give the same text, and ``from_toml`` returns an equal recipe."""
    content = recipe.model_dump(by_alias=True, mode="json", exclude_none=True)
    if not recipe.absorb:
        del content["absorb"]
    if recipe.prompt_limit == PROMPT_LIMIT:
        del content["prompt_limit"]
    passes, checks, concepts = content.pop("pass"), content.pop("checks"), content.pop("concept")
    gate, publish = content.pop("gate"), content.pop("publish", None)
    parts = [_lines(content)]
    for use in passes:
        parts.append("[[pass]]\n" + _lines({"name": use["name"]}))
        if use["options"]:
            parts[-1] += "[pass.options]\n" + tomli_w.dumps(dict(sorted(use["options"].items())))
    if not recipe.checks.require_judge:
        del checks["require_judge"]
    parts.append("[checks]\n" + _lines(checks))
    if publish is not None:
        parts.append("[publish]\n" + _lines(publish))
    if gate:
        parts.append("[gate]\n" + tomli_w.dumps(dict(sorted(gate.items()))))
    parts += ["[[concept]]\n" + _lines(concept) for concept in concepts]
    return "\n".join(parts)


def _lines(table: Mapping[str, Any]) -> str:
    # Every field that may be empty is empty by default, so empty ones can be left out. This does not hold for options.
    return tomli_w.dumps({key: value for key, value in table.items() if value not in ("", [])})


def from_content(content: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from the content of a file. Raises ErasecError that names the key at fault."""
    version = content.get("erasec", FORMAT)
    if isinstance(version, str) and re.fullmatch(r"\d+\.\d+", version) and _version(version) > _version(FORMAT):
        raise ErasecError(
            f"the recipe has format {version}",
            why=f"this erasec knows formats up to {FORMAT}",
            where=where,
            fix="pip install --upgrade erasec",
        )
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _recipe_error(error, content, where) from error
    return recipe.model_copy(update={"erase": tuple(name for given in recipe.erase for name in listed(given))})


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _recipe_error(error: ValidationError, content: Mapping[str, Any], where: str) -> ErasecError:
    """The error for the first fault of a recipe. It names the key as it is written in TOML."""
    first = error.errors()[0]
    table, *rest = first["loc"] or ("",)
    kinds: dict[object, type[BaseModel]] = {
        "pass": NamedOptions,
        "concept": Concept,
        "checks": Limits,
        "publish": Publish,
    }
    inside = kinds.get(table) if rest else None
    key = ".".join(str(part) for part in (rest if inside else first["loc"]) if not isinstance(part, int)) or str(table)
    if inside and isinstance(rest[0], int):
        item = content[str(table)][rest[0]]
        name = f" ({item['name']})" if isinstance(item, Mapping) and "name" in item else ""
        where = f"{where}, [[{table}]] {rest[0] + 1}{name}".removeprefix(", ")
    elif inside:
        where = f"{where}, [{table}]".removeprefix(", ")
    if first["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in (inside or Recipe).model_fields.items()]
        return ErasecError(f"there is no key {key!r} in a recipe", why=suggestion(key, known), where=where)
    if first["type"] == "missing":
        return ErasecError(f"the recipe has no {key!r}", where=where, fix=f'add  {key} = "..."')
    if "options" in rest:
        why = "an option is text, a finite number, true or false"
        return ErasecError(f"{rest[2]} is {first['input']!r}" if rest[2:] else "options is no table", why, where=where)
    if key == "audit":
        why = "the suites of attacks are quick, standard and full"
        return ErasecError(f"there is no suite {first['input']!r}", why=why, where=where)
    if key == "device":
        why = 'a device is "auto", "cpu", "cuda", "cuda:0" and so on, or "mps"'
        return ErasecError(f"there is no device {first['input']!r}", why=why, where=where)
    why = first["msg"].removeprefix("Value error, ").replace("tuple", "list")  # TOML has no tuples
    return ErasecError(f"{key} is {first['input']!r}", why=why, where=where)
