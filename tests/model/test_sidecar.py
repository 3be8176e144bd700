"""What a checkpoint carries beside its weights: gathered from edits, written, read back, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasec.base import Context, Output
from erasec.checkpoint.folder import CARRIED, Folder
from erasec.checkpoint.safetensors import read_header, save
from erasec.errors import ErasecError
from erasec.model import sidecar as extras
from erasec.model import view as models
from erasec.model.edit import Dense, Edit, Memory
from erasec.model.sidecar import KINDS, Extras, gathered
from erasec.registry import load_target, targets
from erasec.targets.hf import Hf
from erasec.targets.ldm import Ldm
from erasec.targets.lora import Lora

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAST = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(at: str = MIDDLE, seed: int = 0, **options: Any) -> Memory:
    return Memory(at, draw(seed, 2, 192), draw(seed + 1, 2, 192), **options)


def edit(**carried: Any) -> Edit:
    return Edit({}, "mine", "star", **carried)


FULL = Extras(
    (memory(), memory(LAST, 5, mode="side", weight=-1.25, until=0.8, guided=True), memory(seed=9)),
    {"<b>": draw(20, 128), "<a>": draw(21, 128).half()},
    "a red star, “ringed”",
)


def same(one: Extras, other: Extras) -> bool:
    told = ("attention", "mode", "weight", "until", "guided")
    if [[getattr(each, name) for name in told] for each in one.memories] != [
        [getattr(each, name) for name in told] for each in other.memories
    ]:
        return False
    if (list(one.tokens), one.negative) != (list(other.tokens), other.negative):
        return False
    pairs = [(one.tensors[name], other.tensors[name]) for name in one.tensors]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_what_edits_carry_is_gathered_in_their_order() -> None:
    one = edit(memories=(memory(),), negative="a star", tokens={"<a>": draw(0, 4)})
    other = edit(memories=(memory(LAST), memory(seed=3)), negative="a ring", tokens={"<b>": draw(1, 4)})
    found = gathered([one, edit(), other, edit(negative="a star")])
    assert [id(each) for each in found.memories] == [id(each) for each in (*one.memories, *other.memories)]
    assert list(found.tokens) == ["<a>", "<b>"]
    assert found.negative == "a star, a ring"
    assert found.kinds == KINDS
    again = gathered([edit(negative="a heart")], FULL)
    assert again.memories == FULL.memories
    assert again.negative == f"{FULL.negative}, a heart"
    assert not gathered([edit()])
    assert gathered([edit(tokens={"<a>": draw(0, 4)})]).kinds == {"tokens"}


def test_two_tokens_of_one_name_are_an_error() -> None:
    with pytest.raises(ErasecError, match="token '<a>' is there twice"):
        gathered([edit(tokens={"<a>": draw(0, 4)}), edit(tokens={"<a>": draw(0, 4)})])
    with pytest.raises(ErasecError, match="token '<a>' is there twice"):
        gathered([edit(tokens={"<a>": draw(0, 4)})], FULL)


@pytest.mark.parametrize("held", [FULL, Extras(negative="a star"), Extras((memory(),))])
def test_what_is_read_is_what_was_written_and_same_bytes(held: Extras, tmp_path: Path) -> None:
    extras.write(tmp_path, held)
    first = (tmp_path / CARRIED).read_bytes()
    found = extras.read(tmp_path)
    assert same(found, held)
    assert found.kinds == held.kinds
    extras.write(tmp_path, found)
    assert (tmp_path / CARRIED).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [CARRIED]
    assert not same(found, Extras(held.memories, held.tokens, "other"))


def test_nothing_is_no_file(tmp_path: Path) -> None:
    assert not extras.read(tmp_path)
    extras.write(tmp_path, Extras())
    assert list(tmp_path.iterdir()) == []
    extras.write(tmp_path, FULL)
    assert extras.read(tmp_path)
    extras.write(tmp_path, Extras())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_an_error_in_words(tmp_path: Path) -> None:
    extras.write(tmp_path, FULL)
    data, (entries, told) = (tmp_path / CARRIED).read_bytes(), read_header(tmp_path / CARRIED)
    content = json.loads(told["erasec.extras"])
    (tmp_path / CARRIED).write_bytes(data[:-4])
    with pytest.raises(ErasecError, match="no whole safetensors"):
        extras.read(tmp_path)
    without = {name: tensor for name, tensor in FULL.tensors.items() if not name.endswith(".values")}
    for tensors, metadata in (
        (without, told),
        (FULL.tensors, {}),
        (FULL.tensors, {"erasec.extras": "[]"}),
        (
            FULL.tensors,
            {"erasec.extras": json.dumps({**content, "memories": [{"attention": MIDDLE, "more": 1}]})},
        ),
    ):
        save(tmp_path / CARRIED, tensors, metadata)
        with pytest.raises(ErasecError, match="is damaged"):
            extras.read(tmp_path)
    save(tmp_path / CARRIED, FULL.tensors, {"erasec.extras": json.dumps({**content, "format": 99})})
    with pytest.raises(ErasecError, match="format 99"):
        extras.read(tmp_path)
    assert set(entries) == set(FULL.tensors)


def test_a_target_refuses_what_it_cannot_hold() -> None:
    extras.refuse(FULL, KINDS, "bundle")
    extras.refuse(Extras(), frozenset(), "hf")
    extras.refuse(Extras((memory(),)), frozenset({"memory"}), "onnx")
    with pytest.raises(ErasecError, match="hf cannot hold all") as caught:
        extras.refuse(FULL, frozenset(), "hf")
    for part in (f"memories at {MIDDLE} and 1 more", "new tokens <b> and 1 more", f"negative prompt {FULL.negative!r}"):
        assert part in caught.value.why
    with pytest.raises(ErasecError, match="hf cannot hold all") as caught:
        extras.refuse(Extras((memory(),)), frozenset(), "hf")
    assert "bundle or onnx" in caught.value.fix
    assert caught.value.why.startswith(f"beside its weights it has memories at {MIDDLE};")
    with pytest.raises(ErasecError, match="onnx cannot hold all") as caught:
        extras.refuse(FULL, frozenset({"memory"}), "onnx")
    assert "memories" not in caught.value.why


def test_which_targets_hold_what() -> None:
    held = {name: load_target(name).holds for name in targets()}
    assert all(held[name] == KINDS for name in ("bundle", "onnx", "openvino", "triton", "trt", "trt-rtx"))
    assert not held["hf"] | held["ldm"] | held["lora"] | Output.holds


@pytest.fixture
def carrying(random_folder: Path, tmp_path: Path) -> Folder:
    root = Path(shutil.copytree(random_folder, tmp_path / "checkpoint"))
    extras.write(root, Extras(tokens={"<a>": draw(0, 128)}))
    return Folder(root)


@pytest.mark.parametrize("target", [Hf(), Ldm()], ids=lambda target: target.name)
def test_targets_of_weights_write_nothing_of_a_checkpoint_with_more(
    carrying: Folder, tmp_path: Path, target: Hf | Ldm
) -> None:
    with pytest.raises(ErasecError, match=f"{target.name} cannot hold all") as caught:
        target.export(carrying, tmp_path / "out", Context())
    assert "new tokens <a>" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_the_folder_where_it_lies_is_refused_too(carrying: Folder) -> None:
    with pytest.raises(ErasecError, match="hf cannot hold all"):
        Hf().export(carrying, carrying.root, Context())
    extras.write(carrying.root, Extras())
    assert all(check.passed for check in Hf().export(carrying, carrying.root, Context()).checks)


def test_a_lora_of_edits_that_carry_more_is_refused(random_folder: Path, tmp_path: Path) -> None:
    base = models.load(str(random_folder))
    site = base.select("cross", "k")[0]
    change = Dense(1e-3 * draw(0, *site.shape))
    with pytest.raises(ErasecError, match="lora cannot hold all") as caught:
        Lora().export(base.with_edit(Edit({site: change}, "mine", "star", memories=(memory(),))), tmp_path, Context())
    assert MIDDLE in caught.value.why
    assert list(tmp_path.iterdir()) == []
    Lora().export(base.with_edit(Edit({site: change}, "mine", "star")), tmp_path, Context())
    assert list(tmp_path.iterdir())
