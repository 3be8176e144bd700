"""Edits as data: how they meet weights, how they compose, and the file that holds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasec.base import Context
from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save
from erasec.errors import ErasecError
from erasec.model import edit as edits
from erasec.model import view as models
from erasec.model.edit import Dense, Edit, LowRank, Memory, Remap, Secret, composed, merge
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Model:
    return models.load(str(random_folder))


@pytest.fixture(scope="module")
def star(base: Model) -> Edit:
    return Uce().solve(base, CONCEPT, Context())


def test_remaps_compose_in_their_order() -> None:
    maps = [Remap(draw(seed, 8, rank) / 4, draw(seed + 1, rank, 8) / 4) for seed, rank in ((0, 1), (10, 3), (20, 8))]
    weight, unit = draw(30, 5, 8), torch.eye(8, dtype=torch.float64)
    wanted = weight
    for step in maps:
        wanted = wanted @ (unit + step.left @ step.right)
    one = composed(tuple(maps))
    assert torch.allclose(weight + one.change(weight), wanted, atol=1e-12)
    assert torch.allclose(merge(weight, maps), wanted, atol=1e-12)
    assert not torch.allclose(merge(weight, maps[::-1]), wanted, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 30, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merged_remap_is_the_float64_one_to_a_millionth_of_the_edit(rank: int, dtype: torch.dtype) -> None:
    weight = draw(0, 40, 64).to(dtype)
    step = Remap(draw(1, 64, rank) / 64**0.5, draw(2, rank, 64) / 64**0.5)
    wanted = weight.double() + step.change(weight)
    found = merge(weight, [step])
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert float((found.double() - wanted).norm() / (wanted - weight.double()).norm()) < 1e-6
    else:  # the storage rounds more than the product does
        assert float((found.double() - wanted.to(dtype).double()).abs().max()) <= 2 * float(
            torch.finfo(dtype).eps * wanted.abs().max()
        )


def test_other_deltas_start_from_what_came_before(base: Model) -> None:
    weight = draw(0, 5, 8)
    steps = [LowRank(draw(1, 5, 2), draw(2, 2, 8)), Remap(draw(3, 8, 2), draw(4, 2, 8)), Dense(draw(5, 5, 8))]
    first = weight + steps[0].change(weight)
    wanted = first + first @ steps[1].left @ steps[1].right + steps[2].change(first)
    assert torch.allclose(merge(weight, steps), wanted, atol=1e-12)


def test_nothing_to_merge_is_the_weight_itself() -> None:
    weight = draw(0, 3, 3).half()
    assert torch.equal(merge(weight, []), weight)
    nothing = Remap(draw(1, 3, 0), draw(2, 0, 3))
    assert torch.equal(merge(weight, [nothing]), weight)
    assert torch.equal(merge(weight, [nothing, nothing]), weight)


def test_a_file_gives_back_the_same_edits_and_the_same_bytes(base: Model, star: Edit, tmp_path: Path) -> None:
    site = base.select("self", "q")[0]
    more = Edit(
        {site: LowRank(draw(0, site.shape[0], 2), draw(1, 2, site.shape[1]))},
        "mine",
        "heart",
        {"rank": 2},
        stats={"a": 1.0},
    )
    last = Edit({site: Dense(draw(2, *site.shape).float())}, "other", "ring")
    model = base.with_edit(star).with_edit(more).with_edit(last)
    for name in ("one", "two"):
        edits.write(tmp_path / name, model.edits, model.about())
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    found, about = edits.read(tmp_path / "one")
    assert about == model.about()
    assert [(e.by, e.concept, dict(e.params), e.base, dict(e.stats)) for e in found] == [
        (e.by, e.concept, dict(e.params), e.base, dict(e.stats)) for e in model.edits
    ]
    assert found[0].asked == {"star": {"erase": ["star"], "keep": ["square"]}}
    again = Model(base.family, base.source, base.name, edits=found)
    edited = [site for site in base.sites if model.deltas(site)]
    assert len(edited) == 15
    for site in edited:
        assert torch.equal(again.merge(site), model.merge(site))
        assert not torch.equal(model.merge(site), base.stored(site))
    assert len({id(delta) for delta in found[0].deltas.values()}) == 1


def test_a_remap_is_stored_once_for_all_its_sites(base: Model, star: Edit, tmp_path: Path) -> None:
    edits.write(tmp_path / "with", [star], {"family": "sd1"})
    edits.write(tmp_path / "without", [star], {"family": "sd1"}, sums=False)
    names = set(read_header(tmp_path / "without")[0])
    assert names == {"0/remap.0.left", "0/remap.0.right"}
    assert {name for name in read_header(tmp_path / "with")[0] if "sums" in name} == {
        f"0/sums/star/context.{part}" for part in ("source", "shift", "keep", "lost")
    }
    assert edits.read(tmp_path / "without")[0][0].sums == {}


def test_files_that_are_none_are_errors_in_words(base: Model, star: Edit, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="there is no edit file"):
        edits.read(tmp_path / "nothing")
    save(tmp_path / "plain", {"a": draw(0, 2)})
    with pytest.raises(ErasecError, match="no edit file of erasec"):
        edits.read(tmp_path / "plain")
    save(tmp_path / "newer", {"a": draw(0, 2)}, {"erasec.edit": json.dumps({"format": 99})})
    with pytest.raises(ErasecError, match="format 99") as caught:
        edits.read(tmp_path / "newer")
    assert "upgrade" in caught.value.fix
    edits.write(tmp_path / "good", [star], {})
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-8])
    with pytest.raises(ErasecError, match="no whole safetensors"):
        edits.read(tmp_path / "cut")


def test_what_is_carried_beside_deltas_comes_back(base: Model, star: Edit, tmp_path: Path) -> None:
    where = "mid_block.attentions.0.transformer_blocks.0.attn2"
    memories = (
        Memory(where, draw(0, 2, 192), draw(1, 2, 192).half()),
        Memory(where, draw(2, 3, 192), draw(3, 3, 192), "side", -0.1, 0.8, True),
    )
    tokens = {"<b>": draw(4, 128).float(), "<a>": draw(5, 128)}
    secret = Secret("star", draw(6, 2, 128), draw(7, 2, 128), (where,))
    more = replace(star, memories=memories, tokens=tokens, negative="a “star”", secret=secret, curves={"loss": [1.0]})
    for name in ("one", "two"):
        edits.write(tmp_path / name, [star, more], {})
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two")
    (plain, found), _ = edits.read(tmp_path / "one")
    assert (plain.memories, plain.tokens, plain.negative) == ((), {}, "")
    assert (list(found.tokens), found.negative) == (["<b>", "<a>"], "a “star”")
    told = ("attention", "mode", "weight", "until", "guided")
    for one, other in zip(found.memories, memories, strict=True):
        assert [getattr(one, name) for name in told] == [getattr(other, name) for name in told]
        for part, wanted in ((one.keys, other.keys), (one.values, other.values)):
            assert part.dtype == wanted.dtype and torch.equal(part, wanted)
    assert all(found.tokens[name].dtype == row.dtype and torch.equal(found.tokens[name], row)
               for name, row in tokens.items())  # fmt: skip
    assert found.secret is None and found.curves == {}
    assert not any(
        tensor.shape == secret.keys.shape for tensor in map(read_tensor, read_header(tmp_path / "one")[0].values())
    )


def test_only_files_that_carry_more_need_a_later_erasec(star: Edit, tmp_path: Path) -> None:
    edits.write(tmp_path / "plain", [star], {})
    edits.write(tmp_path / "more", [replace(star, negative="a star")], {})
    formats = [json.loads(read_header(tmp_path / name)[1]["erasec.edit"])["format"] for name in ("plain", "more")]
    assert formats == [1, 2]
