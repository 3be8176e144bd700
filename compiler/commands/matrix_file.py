"""Many builds in one file: every model with every concept and every variant of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from erasec.checkpoint.staging import file_name
from erasec.documents import read_toml
from erasec.errors import ErasecError
from erasec.recipe.concept import Phrase
from erasec.recipe.recipe import Recipe, from_content, refuse_code

OWN = ("model", "erase", "revision", "digest")  # keys of a recipe that a matrix sets itself


class Variant(BaseModel):
    """A recipe without model and concepts, of which every pair of them gets a build. Other keys are those of a recipe;
    they replace the ones in [build], table by table."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]


class Matrix(BaseModel):
    """The content of a matrix file.

    ``concepts`` are names, files or phrases, as after --erase; a list among them is erased in one build. ``build`` has
    the keys of a recipe that all builds share. Without ``variants``, there is one for each model and concept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[tuple[Phrase, ...], Field(min_length=1)]
    concepts: Annotated[tuple[Phrase | tuple[Phrase, ...], ...], Field(min_length=1)]
    build: dict[str, Any] = {}
    variants: Annotated[tuple[Variant, ...], Field(alias="variant")] = ()


@dataclass(frozen=True)
class Job:
    """One build. ``name`` is that of its folder; ``variant`` is "" where the matrix has none."""

    name: str
    model: str
    concepts: tuple[str, ...]
    variant: str
    recipe: Recipe


def from_file(path: Path, allow_code: bool = False) -> tuple[Job, ...]:
    """The builds of a matrix file, those of one model together.

    Raises ErasecError that names the key at fault; where two builds would have one folder; where a recipe names one of
    several GPUs; and, without ``allow_code``, where a recipe names a Python file.
    """
    content = read_toml(path, "the matrix")
    try:
        matrix = Matrix.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ErasecError(f"the matrix has an invalid key {key!r}", why=first["msg"], where=str(path)) from error
    jobs = []
    for model in matrix.models:
        for concepts in matrix.concepts:
            erase = (concepts,) if isinstance(concepts, str) else concepts
            for variant in matrix.variants or (None,):
                jobs.append(_job(matrix, model, erase, variant, path))
    for job in jobs:
        if job.recipe.device.startswith("cuda:"):
            raise ErasecError(
                f"a build of a matrix cannot have the device {job.recipe.device!r}",
                why="each build gets a GPU of its own, and sees no other",
                where=str(path),
                fix='write device = "cuda", and set CUDA_VISIBLE_DEVICES to the GPUs that the matrix may use',
            )
        if not allow_code:
            refuse_code(job.recipe, str(path))
    names = [job.name for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasecError(
            f"two builds would have the folder {twice[0]}",
            why="each model, list of concepts and variant may be there once",
            where=str(path),
        )
    return tuple(jobs)


def _job(matrix: Matrix, model: str, erase: tuple[str, ...], variant: Variant | None, path: Path) -> Job:
    own = variant.model_dump(exclude={"name"}) if variant else {}
    if wrong := sorted({*matrix.build, *own} & set(OWN)):
        raise ErasecError(
            f"the key {wrong[0]!r} is not one of a variant",
            why="a matrix has the models and the concepts of its builds in models and concepts",
            where=str(path),
        )
    recipe = from_content({**_merged(matrix.build, own), "model": model, "erase": list(erase)}, str(path))
    label = variant.name if variant else ""
    last = Path(model).stem if model.endswith(".safetensors") else model.rstrip("/").rsplit("/", 1)[-1]
    names = erase if len(erase) <= 3 else (erase[0], f"and {len(erase) - 1} more")
    name = file_name(filter(None, [last, "without", *(Path(each).stem for each in names), label]))
    return Job(name, model, erase, label, recipe)


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``shared`` with the keys of ``own``; where both have a table, their keys together."""
    merged = {**shared, **own}
    for key in shared.keys() & own.keys():
        if isinstance(shared[key], Mapping) and isinstance(own[key], Mapping):
            merged[key] = {**shared[key], **own[key]}
    return merged
