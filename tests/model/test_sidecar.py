"""The extras of a checkpoint: gathered from edits, written, read back, and refused by targets that cannot hold them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasec.base import Context, Output
from erasec.checkpoint.folder import EXTRAS_FILE, Folder
from erasec.checkpoint.safetensors import read_header, save_tensors
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.model.memory import Memory
from erasec.model.sidecar import KINDS, Extras, check_supported, gather_extras, read_extras, write_extras
from erasec.registry import load_target, targets
from erasec.runtime.backends import carried_text
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
    return Edit({}, "mine", ("star",), "", **carried)


FULL = Extras(
    (memory(), memory(LAST, 5, mode="side", weight=-1.25, until=0.8, guided=True), memory(seed=9)),
    {"<b>": draw(20, 128), "<a>": draw(21, 128).half()},
    "a red star, “ringed”",
)


def same(one: Extras, other: Extras) -> bool:
    fields = ("attention", "mode", "weight", "until", "guided")
    if [[getattr(memory, name) for name in fields] for memory in one.memories] != [
        [getattr(memory, name) for name in fields] for memory in other.memories
    ]:
        return False
    if (list(one.tokens), one.negative) != (list(other.tokens), other.negative):
        return False
    pairs = [(one.tensors[name], other.tensors[name]) for name in one.tensors]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_extras_of_edits_are_gathered_in_their_order() -> None:
    first = edit(memories=(memory(),), negative="a star", tokens={"<a>": draw(0, 4)})
    second = edit(memories=(memory(LAST), memory(seed=3)), negative="a ring", tokens={"<b>": draw(1, 4)})
    extras = gather_extras([first, edit(), second, edit(negative="a star")])
    assert [id(memory) for memory in extras.memories] == [id(memory) for memory in (*first.memories, *second.memories)]
    assert list(extras.tokens) == ["<a>", "<b>"]
    assert extras.negative == "a star, a ring"
    assert extras.kinds == KINDS
    again = gather_extras([edit(negative="a heart")], FULL)
    assert again.memories == FULL.memories
    assert again.negative == f"{FULL.negative}, a heart"
    assert not gather_extras([edit()])
    assert gather_extras([edit(tokens={"<a>": draw(0, 4)})]).kinds == {"tokens"}


def test_two_tokens_of_one_name_are_an_error() -> None:
    with pytest.raises(ErasecError, match="token '<a>' is there twice"):
        gather_extras([edit(tokens={"<a>": draw(0, 4)}), edit(tokens={"<a>": draw(0, 4)})])
    with pytest.raises(ErasecError, match="token '<a>' is there twice"):
        gather_extras([edit(tokens={"<a>": draw(0, 4)})], FULL)


@pytest.mark.parametrize("extras", [FULL, Extras(negative="a star"), Extras((memory(),))])
def test_extras_come_back_and_give_the_same_bytes(extras: Extras, tmp_path: Path) -> None:
    write_extras(tmp_path, extras)
    first = (tmp_path / EXTRAS_FILE).read_bytes()
    loaded = read_extras(tmp_path)
    assert same(loaded, extras)
    assert loaded.kinds == extras.kinds
    write_extras(tmp_path, loaded)
    assert (tmp_path / EXTRAS_FILE).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [EXTRAS_FILE]
    assert not same(loaded, Extras(extras.memories, extras.tokens, "other"))


def test_empty_extras_leave_no_file(tmp_path: Path) -> None:
    assert not read_extras(tmp_path)
    write_extras(tmp_path, Extras())
    assert list(tmp_path.iterdir()) == []
    write_extras(tmp_path, FULL)
    assert read_extras(tmp_path)
    write_extras(tmp_path, Extras())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    write_extras(tmp_path, FULL)
    data, (entries, header) = (tmp_path / EXTRAS_FILE).read_bytes(), read_header(tmp_path / EXTRAS_FILE)
    content = json.loads(header["erasec.extras"])
    (tmp_path / EXTRAS_FILE).write_bytes(data[:-4])
    with pytest.raises(ErasecError, match="no whole safetensors"):
        read_extras(tmp_path)
    without = {name: tensor for name, tensor in FULL.tensors.items() if not name.endswith(".values")}
    for tensors, metadata in (
        (without, header),
        (FULL.tensors, {}),
        (FULL.tensors, {"erasec.extras": "[]"}),
        (
            FULL.tensors,
            {"erasec.extras": json.dumps({**content, "memories": [{"attention": MIDDLE, "more": 1}]})},
        ),
    ):
        save_tensors(tmp_path / EXTRAS_FILE, tensors, metadata)
        with pytest.raises(ErasecError, match="is damaged"):
            read_extras(tmp_path)
    save_tensors(tmp_path / EXTRAS_FILE, FULL.tensors, {"erasec.extras": json.dumps({**content, "format": 99})})
    with pytest.raises(ErasecError, match="format 99"):
        read_extras(tmp_path)
    assert set(entries) == set(FULL.tensors)


def test_one_flipped_byte_is_an_error_for_both_readers(tmp_path: Path) -> None:
    write_extras(tmp_path, FULL)
    data = bytearray((tmp_path / EXTRAS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / EXTRAS_FILE).write_bytes(data)
    for read in (read_extras, carried_text):
        with pytest.raises(ErasecError, match="is damaged"):
            read(tmp_path)


def test_a_target_refuses_what_it_cannot_hold() -> None:
    check_supported(FULL, KINDS, "bundle")
    check_supported(Extras(), frozenset(), "hf")
    check_supported(Extras((memory(),)), frozenset({"memory"}), "onnx")
    with pytest.raises(ErasecError, match="hf cannot hold all") as caught:
        check_supported(FULL, frozenset(), "hf")
    for part in (f"memories at {MIDDLE} and 1 more", "new tokens <b> and 1 more", f"negative prompt {FULL.negative!r}"):
        assert part in caught.value.why
    with pytest.raises(ErasecError, match="hf cannot hold all") as caught:
        check_supported(Extras((memory(),)), frozenset(), "hf")
    assert "bundle or onnx" in caught.value.fix
    assert caught.value.why.startswith(f"besides its weights it has memories at {MIDDLE};")
    with pytest.raises(ErasecError, match="onnx cannot hold all") as caught:
        check_supported(FULL, frozenset({"memory"}), "onnx")
    assert "memories" not in caught.value.why


def test_which_targets_hold_what() -> None:
    supported = {name: load_target(name).extras for name in targets()}
    assert all(supported[name] == KINDS for name in ("bundle", "onnx", "openvino", "triton", "trt", "trt-rtx"))
    assert not supported["hf"] | supported["ldm"] | supported["lora"] | Output.extras


@pytest.fixture
def carrying(random_folder: Path, tmp_path: Path) -> Folder:
    root = Path(shutil.copytree(random_folder, tmp_path / "checkpoint"))
    write_extras(root, Extras(tokens={"<a>": draw(0, 128)}))
    return Folder(root)


@pytest.mark.parametrize("target", [Hf(), Ldm()], ids=lambda target: target.name)
def test_targets_of_weights_write_nothing_of_a_checkpoint_with_extras(
    carrying: Folder, tmp_path: Path, target: Hf | Ldm
) -> None:
    with pytest.raises(ErasecError, match=f"{target.name} cannot hold all") as caught:
        target.export(carrying, tmp_path / "out", Context())
    assert "new tokens <a>" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_a_folder_with_extras_in_its_place_is_refused_too(carrying: Folder) -> None:
    with pytest.raises(ErasecError, match="hf cannot hold all"):
        Hf().export(carrying, carrying.root, Context())
    write_extras(carrying.root, Extras())
    assert all(check.passed for check in Hf().export(carrying, carrying.root, Context()).checks)


def test_a_lora_of_edits_with_extras_is_refused(random_folder: Path, tmp_path: Path) -> None:
    base = loading.load(str(random_folder))
    site = base.select("cross", "k")[0]
    change = Dense(1e-3 * draw(0, *site.shape))
    with pytest.raises(ErasecError, match="lora cannot hold all") as caught:
        Lora().export(
            base.with_edit(Edit({site: change}, "mine", ("star",), "", memories=(memory(),))), tmp_path, Context()
        )
    assert MIDDLE in caught.value.why
    assert list(tmp_path.iterdir()) == []
    Lora().export(base.with_edit(Edit({site: change}, "mine", ("star",), "")), tmp_path, Context())
    assert list(tmp_path.iterdir())
