"""Target edit: the file makes the same checkpoint, and its check notices a file that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.model import edit_file
from erasec.model.edit import Dense, Edit
from erasec.model.memory import Memory
from erasec.model.sidecar import gather_extras, write_extras
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.targets.edit_file import EditFile

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
HEART = Concept(name="heart", erase=("heart",), anchor="ring", keep=("square", "box"))


def test_the_file_makes_the_same_checkpoint(base: Model, tmp_path: Path) -> None:
    model = base.with_edit(Uce().solve(base, STAR, Context()))
    artifact = EditFile().export(model, tmp_path, Context())
    assert [(check.name, check.value, check.passed) for check in artifact.checks] == [("edit/again", 0.0, True)]
    file = tmp_path / "star.edit.safetensors"
    assert file.stat().st_size <= 1.1 * EditFile().size(base)
    small = tmp_path / "small"
    EditFile(sums=False).export(model, small, Context())
    assert (small / file.name).stat().st_size < file.stat().st_size
    whole = tmp_path / "whole"
    EditFile(tensors=True).export(model, whole, Context())
    assert EditFile().size(base) < (whole / file.name).stat().st_size <= 1.1 * EditFile(tensors=True).size(base)


def test_the_check_notices_a_file_that_makes_another(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base.with_edit(Uce().solve(base, STAR, Context()))
    other = base.with_edit(Uce().solve(base, HEART, Context()))
    monkeypatch.setattr("erasec.model.edit_file.read_edits", lambda path: (other.edits, {}))
    check = EditFile().export(model, tmp_path, Context()).checks[0]
    assert (check.value, check.passed) == (14.0, False)


@pytest.mark.parametrize(
    ("lost", "count"),
    [
        ({"memories": ()}, 3.0),
        ({"tokens": {}}, 2.0),
        ({"negative": ""}, 1.0),
        ({"negative": "a ring"}, 1.0),
        ({"tokens": {"<a>": torch.zeros(128)}}, 1.0),
        ({}, 0.0),
    ],
)
def test_the_check_notices_lost_extras(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: dict[str, object], count: float
) -> None:
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *torch.ones(2, 3, 192), mode="side")
    uce = Uce().solve(base, STAR, Context())
    model = base.with_edit(replace(uce, memories=(memory,), tokens={"<a>": torch.ones(128)}, negative="a star"))
    read = edit_file.read_edits

    def losing(path: Path) -> tuple[tuple[Edit, ...], dict[str, object]]:
        edits, about = read(path)
        return tuple(replace(edit, **lost) for edit in edits), about  # type: ignore[arg-type]

    monkeypatch.setattr("erasec.model.edit_file.read_edits", losing)
    check = EditFile().export(model, tmp_path, Context()).checks[0]
    assert (check.name, check.value, check.passed) == ("edit/again", count, count == 0)
    assert "14 edited tensors and 3 tensors of extras" in check.how


def test_the_check_notices_another_strength_of_a_memory(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *torch.ones(2, 3, 192), mode="side")
    model = base.with_edit(Edit({}, "hand", ("star",), "", memories=(memory,)))
    other = base.with_edit(Edit({}, "hand", ("star",), "", memories=(replace(memory, weight=-1.0),)))
    monkeypatch.setattr("erasec.model.edit_file.read_edits", lambda path: (other.edits, {}))
    assert not EditFile().export(model, tmp_path, Context()).checks[0].passed


@pytest.mark.parametrize("concept", ["AC/DC logo", "../x", "/x", "\u732b" * 80, "///"])
def test_the_file_has_a_safe_name(base: Model, tmp_path: Path, concept: str) -> None:
    edit = Edit({base.sites[0]: Dense(torch.zeros(base.sites[0].shape))}, "mine", (concept,), "")
    EditFile().export(base.with_edit(edit), tmp_path / "deep" / "out", Context())
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.parent == tmp_path / "deep" / "out"
    assert edit_file.read_edits(file)[0][0].concepts == (concept,)


def test_what_an_edit_carries_is_compared_with_the_checkpoint(base: Model, tmp_path: Path) -> None:
    """Memories, tokens, the negative prompt, and the edited tensors that relinking writes."""
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *torch.ones(2, 3, 192), mode="side")
    own = replace(Uce().solve(base, STAR, Context()), memories=(memory,), tokens={"<a>": torch.ones(128)}, negative="x")
    model, out = base.with_edit(own), tmp_path / "edit"
    base.source.write(tmp_path / "bundle", model.merged(), False)
    write_extras(tmp_path / "bundle", gather_extras(model.edits))
    checkpoint = Folder(tmp_path / "bundle")
    EditFile(tensors=True).export(model, out, Context())
    checks = EditFile().compare(base, checkpoint, out)
    assert [(check.name, check.passed) for check in checks] == [
        ("edit/merged", True),
        ("edit/extras", True),
        ("edit/tensors", True),
    ]
    (file,) = out.iterdir()

    def failed(edit: Edit, tensors: dict[str, torch.Tensor] | None = None) -> list[str]:
        edit_file.write_edits(file, [edit], model.base_record(), merged=tensors)
        return [check.name for check in EditFile().compare(base, checkpoint, out) if not check.passed]

    assert failed(own) == []
    assert failed(replace(own, memories=())) == failed(replace(own, tokens={})) == ["edit/extras"]
    assert (
        failed(replace(own, negative=""))
        == failed(replace(own, memories=(replace(memory, weight=9.0),)))
        == ["edit/extras"]
    )
    site = next(iter(model.edited_sites))
    assert failed(own, {f"{site.component}/{site.key}": base.stored_weight(site)}) == ["edit/tensors"]
    assert failed(own, {"unet/more": torch.ones(1)}) == ["edit/tensors"]
    (out / "more").touch()
    assert failed(own) == ["edit/files"]
