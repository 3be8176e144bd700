"""Whether an output folder already is what a plan would build, so that there is nothing to do."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint import manifest
from erasec.checkpoint.safetensors import file_digest
from erasec.commands.release import private_folder
from erasec.commands.solved import code_digest
from erasec.documents import read_json
from erasec.errors import ErasecError
from erasec.judging import picture_cache
from erasec.recipe.recipe import to_toml
from erasec.reporting import collect
from erasec.reporting.read import REPORT

if TYPE_CHECKING:
    from erasec.commands.plan import Plan


def inputs(plan: Plan) -> str:
    """A digest of everything that a build depends on: the resolved recipe, the model, the content of all files that the
    recipe names, the device, erasec's own code, and the versions of the libraries."""
    recipe = plan.recipe.model_dump(mode="json")
    facts = [
        to_toml(plan.recipe),
        picture_cache.identity(plan.model),
        {str(path): file_digest(path) for path in sorted(set(_files(recipe)))},
        plan.context.device,
        code_digest(),
        collect.environment(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _files(value: Any) -> Iterator[Path]:
    """The files that texts in a recipe name, alone or as in "NAME:option=FILE,option=FOLDER". Those of the model are
    left out: its identity says what they hold."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name != "model":
                yield from _files(item)
    elif isinstance(value, list):
        for item in value:
            yield from _files(item)
    elif isinstance(value, str):
        for word in {value, *re.split("[:=,]", value)}:
            path = Path(word).expanduser() if 0 < len(word) < 256 and "\0" not in word else None
            if path is not None and path.is_dir() and len(path.parts) > 1:
                yield from (file for file in path.rglob("*") if file.is_file())
            elif path is not None and path.is_file():
                yield path


def current(plan: Plan) -> dict[str, Any] | None:
    """The facts of the report in ``plan.out``, where that folder is what ``plan`` would build, in every byte.

    None where it is not, and for a plan that signs: no record says which key signed before.
    """
    if plan.sign is not None or not (plan.out / manifest.FILE).is_file():
        return None
    try:
        facts = read_json(plan.out / REPORT, dict[str, Any])
        if facts.get("inputs") != inputs(plan):
            return None
        content, _ = manifest.read(plan.out)
        differences = manifest.compare(plan.out, content)
    except (ErasecError, OSError):  # it is damaged, and is built again
        return None
    private = private_folder(plan.out)
    if any(not item["inside"] and not (private / item["path"]).exists() for item in facts.get("undoing", [])):
        return None
    lost = set(content.movable) - {path.relative_to(plan.out).as_posix() for path in plan.out.rglob("*")}
    return None if content.renewed or differences.all or lost else facts
