"""Whether an output folder already is what a plan would build, so that there is nothing to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from erasec import registry
from erasec.checkpoint import manifest
from erasec.checkpoint.inputs import code_digest, file_digests, requirements, source_digest, versions
from erasec.commands.release import private_folder
from erasec.documents import read_json
from erasec.errors import ErasecError
from erasec.judging import picture_cache
from erasec.recipe.recipe import Recipe, code_file, parse_named_options, to_toml
from erasec.reporting import collect
from erasec.reporting.read import REPORT
from erasec.tensorrt.devices import visible_models
from erasec.training.processes import process_count

if TYPE_CHECKING:
    from erasec.commands.plan import Plan


def inputs(plan: Plan) -> str:
    """A digest of everything that a build depends on: the resolved recipe, the model, the files that the recipe named
    when the plan was made, the device and the GPUs, erasec's own code, and the versions of the libraries and of the
    packages that add classes.

    A build takes it before it begins: what changes while it runs then differs from what it recorded.
    """
    facts = [
        to_toml(plan.recipe),
        picture_cache.identity(plan.model),
        dict(plan.files_read),
        plan.judge.digest if plan.judge else "",
        [plan.context.device, visible_models()],
        [code_digest(), *(source_digest(type(each)) for each in (*plan.passes, *plan.targets))],
        [collect.environment(), versions(requirements()), registry.distributions()],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recipe_files(recipe: Recipe) -> dict[str, str]:
    """The digests of the files that a recipe names, by path, and of those in the folders that its options name. Those
    of the model are left out: its identity says what they hold."""
    return file_digests(_paths(recipe))


def _paths(recipe: Recipe) -> Iterator[object]:
    """What may be a path in a recipe. Phrases and prompts are none, whatever lies in the working directory."""
    uses = [
        *recipe.passes,
        *(parse_named_options(text, "--target") for text in recipe.targets),
        *(parse_named_options(text, "--judge") for text in recipe.judges),
    ]
    for use in uses:
        if (file := code_file(use.name)) is not None:
            yield str(file)
        yield from use.options.values()
    yield from (*recipe.keys, *recipe.prompts, recipe.captions)
    for concept in recipe.concepts:
        for options in concept.judges.values():
            for value in options.values():
                yield from value if isinstance(value, tuple) else (value,)


def current(plan: Plan) -> dict[str, Any] | None:
    """The facts of the report in ``plan.out``, where that folder is what ``plan`` would build, in every byte.

    None where it is not; for a plan that signs, as no record says which key signed before; and where several processes
    train together, as the others have begun and wait for this one.
    """
    if plan.sign is not None or process_count() > 1 or not (plan.out / manifest.FILE).is_file():
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
