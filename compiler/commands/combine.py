"""``erasec combine``: solves the concepts of several edit files as one edit, from the sums stored in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from erasec import registry
from erasec.checkpoint.staging import check_free, check_place, output
from erasec.closed_form.base import ClosedForm
from erasec.errors import ErasecError, reason, suggestion
from erasec.family import FAMILIES
from erasec.model.edit_file import read_edits, write_edits
from erasec.model.sidecar import describe, gather_extras
from erasec.options import configure
from erasec.recipe.goals import first_disputed, recorded_goals

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.edit import Edit


def combine(files: Sequence[Path], without: Sequence[str], out: Path) -> Edit:
    """Solve the concepts of several edit files, except those in ``without``, as one edit, and write it to ``out``.

    The sums stored in the files are added, so no model is needed. The order of the files does not matter: the result is
    the edit of a build of all these concepts. Raises ErasecError if the files differ in pass, options or base.
    """
    check_place(out)
    if out.exists():
        raise ErasecError(f"{out} exists", fix="give a path that does not exist yet")
    check_free(out)
    contents = [(file, *read_edits(file)) for file in files]
    first, about = contents[0][1][0], contents[0][2]
    sums: dict[str, Mapping[str, Tensor]] = {}
    phrases: dict[str, Mapping[str, Sequence[str]]] = {}
    for file, edits, _ in contents:
        if len(edits) != 1 or not edits[0].sums:
            raise ErasecError(
                f"{file.name} cannot be combined",
                why="it is not one closed-form edit with stored sums",
                fix="erasec build MODEL --erase C --pass uce --target edit   writes such a file",
            )
        if kinds := gather_extras(edits).kinds:
            raise ErasecError(
                f"{file.name} cannot be combined",
                why=f"it has {describe(kinds)}, which cannot be solved from sums",
                fix="build the concepts together: erasec build MODEL --erase A --erase B",
            )
        _check_same(first, edits[0], files[0].name, file.name)
        for concept in edits[0].sums:
            if concept in sums and concept not in ("", *without):
                raise ErasecError(f"{concept!r} is in two of the files", fix="give only one of them")
        sums |= edits[0].sums
        phrases |= edits[0].phrases
    for concept in without:
        if concept not in phrases:
            raise ErasecError(f"no file holds {concept!r}", why=f"they hold {', '.join(sorted(phrases))}")
        del sums[concept], phrases[concept]
    if not phrases:
        raise ErasecError("nothing is left to erase", fix="keep at least one concept")
    _check_disputed(phrases)
    kind = _pass(first.by, files[0])
    if (family := FAMILIES.get(about["family"])) is None:
        raise ErasecError(
            f"{files[0].name} is for the family {about['family']!r}", why=suggestion(about["family"], FAMILIES)
        )
    streams = {
        stream.name: tuple(s for s in first.deltas if s.attn == stream.attn and s.proj in stream.projections)
        for stream in family.streams
    }
    try:
        solved = configure(kind, first.params, first.by).edit_from_sums(streams, sums, first.base)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:  # torch's, for matrices that do not fit together
        raise ErasecError(
            "the stored sums of these files do not fit together",
            why=reason(error),
            fix="build the concepts together: erasec build MODEL --erase A --erase B",
        ) from error
    combined = replace(solved, phrases=phrases)
    with output(out, fresh=True) as own:
        write_edits(own.stage, [combined], about)
        own.publish()
    return combined


def _pass(name: str, file: Path) -> type[ClosedForm]:
    """The pass of an edit file, by its registered name alone: an edit file must not name code that then runs."""
    kind = registry.load_pass(name) if name in registry.passes() else None
    if kind is None or not issubclass(kind, ClosedForm):
        raise ErasecError(
            f"{file.name} cannot be combined",
            why=f"it was made by {name!r}, which is no registered closed-form pass",
            fix="build the concepts together: erasec build MODEL --erase A --erase B",
        )
    return kind


def _check_same(first: Edit, second: Edit, first_name: str, second_name: str) -> None:
    """Raise ErasecError if two edits differ in pass, base, options or prior."""
    for what, a, b in (("pass", first.by, second.by), ("base", first.base, second.base)):
        if a != b:
            raise ErasecError(f"{first_name} and {second_name} differ in their {what}", why=f"{a[:24]} and {b[:24]}")
    params = {key for key in (*first.params, *second.params) if first.params.get(key) != second.params.get(key)}
    if params:
        key = min(params)
        why = f"{key} is {first.params.get(key)!r} in the one and {second.params.get(key)!r} in the other"
        raise ErasecError(f"{first_name} and {second_name} differ in their options", why=why)
    prior, second_prior = first.sums.get("", {}), second.sums.get("", {})
    if prior.keys() != second_prior.keys() or any(not bool((prior[key] == second_prior[key]).all()) for key in prior):
        raise ErasecError(f"{first_name} and {second_name} differ in their prior", fix="build them with the same prior")


def _check_disputed(phrases: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Raise ErasecError if one concept keeps a phrase that another one erases, or becomes it. ``phrases`` are by
    concept."""
    for name, own in phrases.items() if len(phrases) > 1 else ():
        erased = [phrase for other in phrases if other != name for phrase in phrases[other]["erase"]]
        folded = {phrase.casefold() for phrase in erased}
        for verb, disputed in (
            ("keeps", next((phrase for phrase in own["keep"] if phrase.casefold() in folded), "")),
            ("becomes", first_disputed(recorded_goals(own, name), erased)),
        ):
            if disputed:
                raise ErasecError(
                    f"{name} {verb} {disputed!r}, which another of the concepts erases",
                    why="the solution would be a compromise between keeping and erasing it"
                    if verb == "keeps"
                    else f"prompts for {name} would draw what the other concept should not show",
                    fix="build them together: --erase A --erase B",
                )
