"""The edit file: what is written comes back, the same edits give the same bytes, and damaged files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasec.base import Context
from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save_tensors
from erasec.errors import ErasecError
from erasec.model import edit_file
from erasec.model.edit import Dense, Edit, LowRank
from erasec.model.memory import Memory, Secret
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def star(base: Model) -> Edit:
    return Uce().solve(base, CONCEPT, Context())


def test_a_file_gives_back_the_same_edits_and_the_same_bytes(base: Model, star: Edit, tmp_path: Path) -> None:
    site = base.select("self", "q")[0]
    more = Edit(
        {site: LowRank(draw(0, site.shape[0], 2), draw(1, 2, site.shape[1]))},
        "mine",
        ("heart",),
        "",
        {"rank": 2},
        stats={"a": 1.0},
    )
    last = Edit({site: Dense(draw(2, *site.shape).float())}, "other", ("ring",), "")
    model = base.with_edit(star).with_edit(more).with_edit(last)
    for name in ("one", "two"):
        edit_file.write_edits(tmp_path / name, model.edits, model.base_record())
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    edits, record = edit_file.read_edits(tmp_path / "one")
    assert record == model.base_record()
    assert [(e.by, e.concepts, dict(e.params), e.base, dict(e.stats)) for e in edits] == [
        (e.by, e.concepts, dict(e.params), e.base, dict(e.stats)) for e in model.edits
    ]
    assert edits[0].phrases == {"star": {"erase": ["star"], "keep": ["square"]}}
    again = Model(base.family, base.source, base.name, edits=edits)
    edited = [site for site in base.sites if model.deltas(site)]
    assert len(edited) == 15
    for site in edited:
        assert torch.equal(again.merged_weight(site), model.merged_weight(site))
        assert not torch.equal(model.merged_weight(site), base.stored_weight(site))
    assert len({id(delta) for delta in edits[0].deltas.values()}) == 1


def test_a_remap_is_stored_once_for_all_its_sites(base: Model, star: Edit, tmp_path: Path) -> None:
    edit_file.write_edits(tmp_path / "with", [star], base.with_edit(star).base_record())
    edit_file.write_edits(tmp_path / "without", [star], base.with_edit(star).base_record(), sums=False)
    names = set(read_header(tmp_path / "without")[0])
    assert names == {"0/remap.0.left", "0/remap.0.right"}
    assert {name for name in read_header(tmp_path / "with")[0] if "sums" in name} == {
        f"0/sums/star/context.{part}" for part in ("source", "shift", "keep", "lost")
    }
    assert edit_file.read_edits(tmp_path / "without")[0][0].sums == {}


def test_files_that_are_no_edit_files_are_errors(base: Model, star: Edit, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="there is no edit file"):
        edit_file.read_edits(tmp_path / "nothing")
    save_tensors(tmp_path / "plain", {"a": draw(0, 2)})
    with pytest.raises(ErasecError, match="no edit file of erasec"):
        edit_file.read_edits(tmp_path / "plain")
    save_tensors(tmp_path / "newer", {"a": draw(0, 2)}, {"erasec.edit": json.dumps({"format": 99})})
    with pytest.raises(ErasecError, match="format 99") as caught:
        edit_file.read_edits(tmp_path / "newer")
    assert "upgrade" in caught.value.fix
    edit_file.write_edits(tmp_path / "good", [star], {})
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-8])
    with pytest.raises(ErasecError, match="no whole safetensors"):
        edit_file.read_edits(tmp_path / "cut")


def test_extras_come_back(base: Model, star: Edit, tmp_path: Path) -> None:
    where = "mid_block.attentions.0.transformer_blocks.0.attn2"
    memories = (
        Memory(where, draw(0, 2, 192), draw(1, 2, 192).half()),
        Memory(where, draw(2, 3, 192), draw(3, 3, 192), "side", -0.1, 0.8, True),
    )
    tokens = {"<b>": draw(4, 128).float(), "<a>": draw(5, 128)}
    secret = Secret("star", draw(6, 2, 128), draw(7, 2, 128), (where,))
    more = replace(star, memories=memories, tokens=tokens, negative="a “star”", secret=secret, curves={"loss": [1.0]})
    for name in ("one", "two"):
        edit_file.write_edits(tmp_path / name, [star, more], base.with_edit(star).base_record())
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    (plain, carrying), _ = edit_file.read_edits(tmp_path / "one")
    assert (plain.memories, plain.tokens, plain.negative) == ((), {}, "")
    assert (list(carrying.tokens), carrying.negative) == (["<b>", "<a>"], "a “star”")
    fields = ("attention", "mode", "weight", "until", "guided")
    for memory, original in zip(carrying.memories, memories, strict=True):
        assert [getattr(memory, name) for name in fields] == [getattr(original, name) for name in fields]
        for part, wanted in ((memory.keys, original.keys), (memory.values, original.values)):
            assert part.dtype == wanted.dtype and torch.equal(part, wanted)
    assert all(
        carrying.tokens[name].dtype == row.dtype and torch.equal(carrying.tokens[name], row)
        for name, row in tokens.items()
    )
    assert carrying.secret is None and carrying.curves == {}
    assert not any(
        tensor.shape == secret.k_rows.shape for tensor in map(read_tensor, read_header(tmp_path / "one")[0].values())
    )


def test_only_files_with_extras_have_the_later_format(star: Edit, tmp_path: Path) -> None:
    edit_file.write_edits(tmp_path / "plain", [star], {})
    edit_file.write_edits(tmp_path / "more", [replace(star, negative="a star")], {})
    formats = [json.loads(read_header(tmp_path / name)[1]["erasec.edit"])["format"] for name in ("plain", "more")]
    assert formats == [1, 2]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(base: Model, tmp_path: Path, number: float) -> None:
    site = base.select("self", "q")[0]
    value = draw(0, *site.shape)
    for wrong in (False, True):
        value[1, 2] = number if wrong else 0.5
        model = base.with_edit(Edit({site: Dense(value)}, "mine", ("star",), ""))
        edit_file.write_edits(tmp_path / "x", model.edits, model.base_record())
        if not wrong:
            assert edit_file.read_edits(tmp_path / "x")[0][0].by == "mine"
    with pytest.raises(ErasecError, match=rf"the tensor 0/unet/{site.key}\.value of x is not finite") as caught:
        edit_file.read_edits(tmp_path / "x")
    assert caught.value.why == "it has a NaN or an infinity"


def test_a_change_of_another_shape_than_its_site_is_refused(base: Model, tmp_path: Path) -> None:
    site = base.select("self", "q")[0]
    rows, columns = site.shape
    for delta in (
        Dense(draw(0, rows, columns + 1)),
        LowRank(draw(0, rows, 2), draw(0, 3, columns)),
        LowRank(draw(0, rows + 1, 2), draw(0, 2, columns)),
    ):
        model = base.with_edit(Edit({site: delta}, "mine", ("star",), ""))
        edit_file.write_edits(tmp_path / "x", model.edits, model.base_record())
        with pytest.raises(ErasecError, match="no edit file of erasec") as caught:
            edit_file.read_edits(tmp_path / "x")
        assert f"change of the shape of unet/{site.key}" in caught.value.why


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda edit: edit["asked"]["star"].pop("keep"), "which phrases a concept erases and keeps"),
        (lambda edit: edit["asked"].update(heart={"erase": [], "keep": []}), "no sums of the concept 'heart'"),
        (lambda edit: edit["deltas"][0]["site"].update(shape=[]), "change of the shape of unet/"),
        (lambda edit: edit["deltas"][0].update(kind="Other"), "kind: it should be 'LowRank', 'Remap' or 'Dense'"),
        (lambda edit: edit.pop("by"), "edits.0: it has no 'by'"),
        (lambda edit: edit["params"].update(deep=[1]), "edits.0.params.deep"),
    ],
)
def test_metadata_that_fits_no_edit_is_refused(
    base: Model, star: Edit, tmp_path: Path, change: Any, words: str
) -> None:
    edit_file.write_edits(tmp_path / "good", [star], base.with_edit(star).base_record())
    entries, metadata = read_header(tmp_path / "good")
    content = json.loads(metadata["erasec.edit"])
    change(content["edits"][0])
    tensors = {key: read_tensor(entry) for key, entry in entries.items()}
    save_tensors(tmp_path / "bad", tensors, {"erasec.edit": json.dumps(content)})
    assert edit_file.read_edits(tmp_path / "good")[0][0].concepts == ("star",)
    with pytest.raises(ErasecError, match="bad is no edit file of erasec") as caught:
        edit_file.read_edits(tmp_path / "bad")
    assert words in caught.value.why
