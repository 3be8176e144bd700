"""What a build hands out: what can undo the erasure is kept apart in a release, and the rest proves what it is.

A release is a build with the table [publish], or with ``--publish`` or ``--sign``, which add it. Its output folder
holds nothing that can undo the erasure, unless the table says so: edits, keys and refittable engines lie in the folder
OUT.private instead, next to it. Every other build writes all of it into its output folder, and its report says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.base import EditTarget
from erasec.checkpoint import manifest, signature
from erasec.checkpoint.disk import PRIVATE_FOLDER
from erasec.checkpoint.safetensors import content_digest
from erasec.checkpoint.staging import Output, check_free, output, settle
from erasec.commands.output_paths import check_replaceable
from erasec.errors import ErasecError
from erasec.keys import key_file
from erasec.reporting.bom import BOM, bill
from erasec.reporting.provenance import PROVENANCE, Facts, epoch, statement
from erasec.reporting.report import write_report, write_text

if TYPE_CHECKING:
    from erasec.commands.plan import Plan
    from erasec.model.view import Model
    from erasec.recipe.recipe import Recipe
    from erasec.reporting.report import Report

PRIVATE = ".private"  # what the name of the folder has in addition to that of the output folder
KEY = "anyone who has it can bring its concept back"

Undoing = tuple[dict[str, Any], ...]  # the field Report.undoing


def private_folder(out: Path) -> Path:
    """The folder for what a release to ``out`` does not hold."""
    return out.parent / f"{out.name}{PRIVATE}"


def check(recipe: Recipe, out: Path, sign: Path | None) -> None:
    """Raise ErasecError where a release cannot be made or signed, before anything is computed; MissingTool where a
    library is missing."""
    epoch()
    if sign is not None:
        signature.check_private_key(sign)
        if sign.resolve().is_relative_to(out.resolve()):
            raise ErasecError(
                f"the private key {sign} lies in the output folder",
                why="an output folder is replaced as a whole, and is what you hand out",
                fix="keep the key elsewhere, or give another folder with --out",
            )
    if recipe.publish is None:
        return
    if recipe.keys and not recipe.publish.keys:
        raise ErasecError(
            "a release cannot contain a key",
            why="the built model shows the concepts of its keys again, so it is as secret as they are",
            fix="leave out --key; or set keys = true in the table [publish] of a recipe",
        )
    private = private_folder(out)
    settle(private)
    check_replaceable(private)
    check_free(private)


@contextmanager
def private_output(plan: Plan) -> Iterator[Output | None]:
    """The right to write the private folder of a release, with an empty stage; None for any other build."""
    if plan.recipe.publish is None:
        yield None
        return
    with output(private_folder(plan.out)) as own:
        own.new_folder().chmod(PRIVATE_FOLDER)
        yield own


def set_apart(plan: Plan, stage: Path, private: Path | None) -> Undoing:
    """Move what a release does not hold from ``stage`` to ``private``; None moves nothing. Returns all that can undo
    the erasure, as ``Report.undoing`` has it."""
    publish = plan.recipe.publish
    undoing: list[dict[str, Any]] = []
    for target in plan.targets:
        if how := target.how_to_undo():
            allowed = publish and (publish.edits if isinstance(target, EditTarget) else publish.refittable)
            undoing.append({"path": target.name, "inside": bool(private is None or allowed), "undoes": how})
    for key in sorted(stage.glob(f"*{key_file.SUFFIX}")):
        inside = bool(private is None or (publish and publish.keys))
        undoing.append({"path": key.name, "inside": inside, "undoes": KEY})
    for item in undoing:
        if private is not None and not item["inside"]:
            (stage / item["path"]).rename(private / item["path"])
    return tuple(undoing)


def notes(plan: Plan, undoing: Undoing) -> Iterator[str]:
    """A sentence for each file or folder that can undo the erasure."""
    for item in undoing:
        if not item["inside"]:
            where = private_folder(plan.out).name
            yield f"{item['path']} can undo the erasure: {item['undoes']}. It is not in this folder, but in {where}."
        elif item["undoes"] != KEY:  # about keys inside, a build has a sentence of its own
            yield f"{item['path']} can undo the erasure: {item['undoes']}. Do not publish it with the other folders."


def edited_tensors(model: Model, absorbed: Sequence[str]) -> dict[str, str]:
    """The sha256 that each edited tensor had in the base, by "component/key". ``absorbed`` are further tensors of the
    denoiser, which hold a key."""
    denoiser = model.family.denoiser
    edited = {f"{site.component}/{site.key}": model.site_digest(site) for site in model.edited_sites}
    return edited | {f"{denoiser}/{key}": content_digest({key: model.entries(denoiser)[key]}) for key in absorbed}


def finish(
    plan: Plan, report: Report, stage: Path, private: Path | None, edited: Mapping[str, str], started: float
) -> None:
    """Write what describes a build into ``stage``: report, bill of materials, provenance, manifest and signature.

    ``edited`` is what ``edited_tensors`` returned, and ``started`` the time when the build began. Every file is read
    once for its digest, and once more by the library that signs.
    """
    write_report(report, stage)
    write_text(stage / BOM, bill(report))
    records = manifest.records(stage, manifest.contents(stage), report.files)
    judges = {plan.judge.title: plan.judge.digest} if plan.judge else {}
    facts = Facts(plan.recipe, edited, judges, started, time.time())
    write_text(stage / PROVENANCE, statement(report, records, facts))
    keys = [path.name for path in stage.glob(f"*{key_file.SUFFIX}")]  # which must not be published with the folders
    manifest.write(stage, records, movable=keys)
    if plan.sign is not None and report.outcome != "rejected":
        signature.sign(stage, plan.sign, plan.out.name)
    if private is not None and any(private.iterdir()):
        manifest.write(private, movable=[path.name for path in private.glob(f"*{key_file.SUFFIX}")])


def publish(plan: Plan, own: Output, private: Output | None) -> None:
    """Put a build in its place, and before it what it does not hold: a key is never lost, whatever happens between."""
    if private is not None and any(private.stage.iterdir()):
        check_replaceable(private.path)
        private.publish()
    own.publish()
