"""Reading and writing safetensors: only what was asked moves, whole files or none, the same bytes every time."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasec import checkpoint
from erasec.checkpoint import Folder
from erasec.errors import ErasecError


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 3, generator=draw),
        "a.weight": torch.randn(4, 2, generator=draw).half(),
        "c.bias": torch.randn(7, generator=draw).bfloat16(),
        "ids": torch.arange(6).reshape(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def test_save_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.safetensors", tensors(), {"zeta": "1", "alpha": "2"})
    entries, metadata = checkpoint.read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "zeta": "1", "alpha": "2"}
    library = load_file(tmp_path / "x.safetensors")
    for key, tensor in tensors().items():
        assert torch.equal(checkpoint.read_tensor(entries[key]), tensor), key
        assert torch.equal(library[key], tensor), key


def test_same_content_same_bytes_in_any_order(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(12)}
    checkpoint.save(tmp_path / "x", tensors(), metadata)
    checkpoint.save(tmp_path / "y", dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_patch_moves_the_named_tensor_and_not_one_other_byte(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base", metadata={"format": "pt"})
    checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: tensors()["b.weight"] + 1})
    before, after = (tmp_path / "base").read_bytes(), (tmp_path / "new").read_bytes()
    entry = checkpoint.read_header(tmp_path / "base")[0]["b.weight"]
    assert before[: entry.start] == after[: entry.start]
    assert before[entry.stop :] == after[entry.stop :]
    assert before[entry.start : entry.stop] != after[entry.start : entry.stop]
    assert torch.equal(load_file(tmp_path / "new")["b.weight"], tensors()["b.weight"] + 1)


@pytest.mark.parametrize("wrong", [torch.zeros(5, 3).half(), torch.zeros(3, 5)])
def test_patch_refuses_another_dtype_or_shape_and_leaves_nothing(tmp_path: Path, wrong: torch.Tensor) -> None:
    save_file(tensors(), tmp_path / "base")
    with pytest.raises(ErasecError, match=r"b\.weight"):
        checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: wrong})
    assert os.listdir(tmp_path) == ["base"]


def test_a_patch_that_came_out_with_another_layout_is_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "base", tensors())
    whole = checkpoint._copy

    def other(source: Any, target: Any, start: int, stop: int) -> None:
        whole(source, target, start, stop)
        if start == 0:
            os.pwrite(target.fileno(), b"I", os.pread(target.fileno(), 400, 0).index(b'"F16"') + 1)

    monkeypatch.setattr(checkpoint, "_copy", other)
    with pytest.raises(ErasecError, match="not written as base is"):
        checkpoint.patch(tmp_path / "base", tmp_path / "out", {"b.weight": lambda: torch.zeros(5, 3)})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_failure_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base")
    (tmp_path / "new").write_bytes(b"old")

    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": fail})
    assert (tmp_path / "new").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["base", "new"]


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "length", "empty"])
def test_a_damaged_file_is_an_error_in_words(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, tensors())
    data = path.read_bytes()
    path.write_bytes({
        "cut": data[:-3], "longer": data + b"x", "header": data[:8] + b"{{" + data[10:],
        "length": (10**12).to_bytes(8, "little") + data[8:], "empty": b"",
    }[damage])  # fmt: skip
    with pytest.raises(ErasecError, match="no whole safetensors file"):
        checkpoint.read_header(path)


def test_content_digest_ignores_layout_and_sees_one_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "ours", tensors())
    save_file(tensors(), tmp_path / "theirs", metadata={"format": "pt", "more": "words"})
    changed = tensors()
    changed["c.bias"][3] += 1
    checkpoint.save(tmp_path / "changed", changed)
    ours, theirs, other = (
        checkpoint.content_digest(checkpoint.read_header(tmp_path / name)[0]) for name in ("ours", "theirs", "changed")
    )
    assert ours == theirs != other


def test_folder_write_keeps_every_other_file_to_the_byte(random_folder: Path, tmp_path: Path) -> None:
    folder = Folder(random_folder)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    old = checkpoint.read_tensor(folder.entries("unet")[key])
    folder.write(tmp_path / "out", {"unet": {key: lambda: old * 2}})
    assert Folder(tmp_path / "out").files() == folder.files()
    moved = [
        name for name in folder.files() if (random_folder / name).read_bytes() != (tmp_path / "out" / name).read_bytes()
    ]
    assert [name.as_posix() for name in moved] == ["unet/diffusion_pytorch_model.safetensors"]
    new = Folder(tmp_path / "out").entries("unet")
    assert torch.equal(checkpoint.read_tensor(new[key]), old * 2)


def test_sharded_weights_are_found_and_pickles_refused(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ErasecError, match="no safetensors weights") as caught:
        Folder(tmp_path).entries("unet")
    assert "run code" in caught.value.why
    checkpoint.save(unet / "part1.safetensors", {"x": torch.ones(2)})
    checkpoint.save(unet / "part2.safetensors", {"y": torch.ones(3)})
    index = {"weight_map": {"x": "part1.safetensors", "y": "part2.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(Folder(tmp_path).entries("unet")) == ["x", "y"]
    Folder(tmp_path).write(tmp_path / "out", {"unet": {"y": lambda: torch.zeros(3)}})
    written = Folder(tmp_path / "out").entries("unet")
    assert torch.equal(checkpoint.read_tensor(written["y"]), torch.zeros(3))
    assert torch.equal(checkpoint.read_tensor(written["x"]), torch.ones(2))


def test_the_bytes_of_a_file_are_these(tmp_path: Path) -> None:
    content = {
        "b.weight": torch.arange(15.0).reshape(5, 3), "a.weight": torch.arange(8).reshape(4, 2).half(),
        "é": torch.zeros(0, 4), "c": torch.tensor(2.5, dtype=torch.float64), "d": torch.arange(7).bfloat16(),
    }  # fmt: skip
    checkpoint.save(tmp_path / "x", content, {"zeta": "1", "alpha": "ü"})
    golden = "413e6db79630f639453bf5046a4efbf53af43cae1e3b8504965b80e815efa6c5"
    assert checkpoint.file_digest(tmp_path / "x") == golden
    checkpoint.save(tmp_path / "y", {**content, "c": content["c"] + 1}, {"zeta": "1", "alpha": "ü"})
    assert checkpoint.file_digest(tmp_path / "y") != golden


def test_stream_asks_for_one_tensor_at_a_time_in_order(tmp_path: Path) -> None:
    asked: list[str] = []

    def make(key: str) -> torch.Tensor:
        asked.append(key)
        return torch.full((2, 3), float(len(asked)))

    checkpoint.stream(tmp_path / "x", {key: ("F32", (2, 3), partial(make, key)) for key in "cab"})
    assert asked == ["a", "b", "c"]
    assert {key: float(value[0, 0]) for key, value in load_file(tmp_path / "x").items()} == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(("dtype", "shape"), [("F16", (2, 3)), ("F32", (3, 2))])
def test_stream_refuses_what_was_not_announced(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ErasecError, match="the new x is float32"):
        checkpoint.stream(tmp_path / "x", {"x": (dtype, shape, lambda: torch.zeros(2, 3))})
    with pytest.raises(ErasecError, match="complex64 cannot be written"):
        checkpoint.save(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []


def test_a_transposed_entry_is_read_and_digested_as_its_logical_self(tmp_path: Path) -> None:
    matrix = tensors()["b.weight"]
    checkpoint.save(tmp_path / "plain", {"x": matrix})
    checkpoint.save(tmp_path / "turned", {"x": matrix.T.contiguous()})
    plain, turned = (checkpoint.read_header(tmp_path / name)[0]["x"] for name in ("plain", "turned"))
    logical = replace(turned, shape=(5, 3), transposed=True)
    read = checkpoint.read_tensor(logical)
    assert torch.equal(read, matrix) and read.is_contiguous()
    digests = [checkpoint.content_digest({"x": entry}) for entry in (plain, logical, turned)]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] != checkpoint.content_digest({"x": replace(turned, shape=(5, 3))})


@pytest.mark.parametrize("fault", ["none", "missing", "refused", "short"])
def test_patch_copies_the_same_bytes_however_the_system_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    save_file(tensors(), tmp_path / "base")
    checkpoint.patch(tmp_path / "base", tmp_path / "expected", {"b.weight": lambda: torch.ones(5, 3)})
    monkeypatch.setattr(checkpoint, "CHUNK", 7)
    whole, calls = getattr(os, "copy_file_range", None), 0

    def refused(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if whole is None or fault == "refused" or calls % 2:
            raise OSError("not between these file systems")
        copied: int = whole(args[0], args[1], min(args[2], 3), args[3])
        return copied

    if fault == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif fault != "none":
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: torch.ones(5, 3)})
    checkpoint.copy(tmp_path / "base", tmp_path / "copy")
    assert (tmp_path / "new").read_bytes() == (tmp_path / "expected").read_bytes()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "base").read_bytes()
    assert calls > 20 or fault in ("none", "missing")


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base")

    def shrink() -> torch.Tensor:
        os.truncate(tmp_path / "base", 200)
        return torch.ones(5, 3)

    with pytest.raises(ErasecError, match="bytes early"):
        checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": shrink})
    assert os.listdir(tmp_path) == ["base"]


KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("link", [True, False])
def test_linked_files_are_one_file_and_patched_ones_are_not(random_folder: Path, tmp_path: Path, link: bool) -> None:
    folder, out = Folder(random_folder), tmp_path / "out"
    before = {name: (random_folder / name).read_bytes() for name in folder.files()}
    old = checkpoint.read_tensor(folder.entries("unet")[KEY])
    try:
        for _ in range(2):  # the second time, over what is there
            folder.write(out, {"unet": {KEY: lambda: old * 2}}, link=link)
        same = {name for name in folder.files() if os.path.samefile(random_folder / name, out / name)}
        patched = Path("unet/diffusion_pytorch_model.safetensors")
        assert same == (set(folder.files()) - {patched} if link else set())
        assert torch.equal(checkpoint.read_tensor(Folder(out).entries("unet")[KEY]), old * 2)
        folder.write(out, {})  # files that were links become copies, and the base keeps its bytes
        assert not any(os.path.samefile(random_folder / name, out / name) for name in folder.files())
    finally:
        assert {name: (random_folder / name).read_bytes() for name in before} == before
    assert {path.name for path in out.rglob(".*")} == set()


def test_links_are_copies_where_the_file_system_has_none(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    Folder(random_folder).write(tmp_path / "out", {}, link=True)
    for name in Folder(random_folder).files():
        assert (tmp_path / "out" / name).read_bytes() == (random_folder / name).read_bytes()


def test_a_folder_is_not_written_into_itself(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "same").symlink_to(random_folder)
    with pytest.raises(ErasecError, match="is the model itself"):
        Folder(random_folder).write(tmp_path / "same", {})


def put(root: Path, *names: str) -> Folder:
    """A folder with one small tensor in each safetensors file, whose value is the file's place in ``names``."""
    (root / "model_index.json").write_text("{}")
    for number, name in enumerate(names):
        (root / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            shards = [f"{Path(name).name.split('.safetensors')[0]}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
            shards = [shard.replace(".fp16.fp16", ".fp16") for shard in shards]
            (root / name).write_text(json.dumps({"weight_map": {"x": shards[0], "y": shards[1]}}))
            for key, shard in zip("xy", shards, strict=True):
                checkpoint.save((root / name).parent / shard, {key: torch.tensor([number])})
        else:
            checkpoint.save(root / name, {"x": torch.tensor([number])})
    return Folder(root)


PLAIN, FP16, NON_EMA = (f"unet/diffusion_pytorch_model{name}.safetensors" for name in ("", ".fp16", ".non_ema"))


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ([PLAIN, FP16, NON_EMA], "", PLAIN),
        ([PLAIN, FP16, NON_EMA], "fp16", FP16),
        ([PLAIN, FP16, NON_EMA], "non_ema", NON_EMA),
        ([FP16], "", FP16),
        ([NON_EMA, PLAIN], "", PLAIN),
        ([PLAIN, "vae/diffusion_pytorch_model.fp16.safetensors"], "fp16", PLAIN),
        (["unet/model.fp16.safetensors"], "fp16", "unet/model.fp16.safetensors"),
    ],
)
def test_a_variant_is_chosen(tmp_path: Path, names: list[str], variant: str, chosen: str) -> None:
    put(tmp_path, *names)
    assert Folder(tmp_path, variant).weight_files("unet") == (tmp_path / chosen,)


@pytest.mark.parametrize(
    "index",
    ["diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16.safetensors.index.json"],
)
@pytest.mark.parametrize("variant", ["fp16", ""])
def test_shards_of_a_variant_are_found_by_either_index(tmp_path: Path, index: str, variant: str) -> None:
    put(tmp_path, f"unet/{index}")
    folder = Folder(tmp_path, variant)
    assert sorted(folder.entries("unet")) == ["x", "y"] and len(folder.weight_files("unet")) == 2
    assert folder.doubles(["unet"]) == ()
    put(tmp_path, PLAIN, f"unet/{index}")
    plain = Folder(tmp_path).doubles(["unet"])
    assert {path.name for path in plain} == {index, *(path.name for path in folder.root.glob("unet/*-of-*"))}
    assert Folder(tmp_path, "fp16").doubles(["unet"]) == (Path(PLAIN),)


@pytest.mark.parametrize("variant", ["", "bf16"])
def test_only_several_variants_is_an_error_that_lists_them(tmp_path: Path, variant: str) -> None:
    put(tmp_path, FP16, NON_EMA, "vae/diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(ErasecError, match="no safetensors weights for unet") as caught:
        Folder(tmp_path, variant).weight_files("unet")
    assert "fp16, non_ema" in caught.value.why
    assert 'variant = "fp16"' in caught.value.fix and "--variant fp16" in caught.value.fix


def test_a_variant_that_no_component_has_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, PLAIN, FP16)
    with pytest.raises(ErasecError, match="no component has the variant 'fp8'") as caught:
        Folder(tmp_path, "fp8").weight_files("unet")
    assert "the plain one, fp16" in caught.value.why


def test_shards_that_are_not_there_or_overlap_are_errors(tmp_path: Path) -> None:
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    folder = put(tmp_path, index)
    first, second = folder.weight_files("unet")
    checkpoint.save(second, {"x": torch.zeros(1), "y": torch.zeros(1)})
    with pytest.raises(ErasecError, match="unet has x twice"):
        folder.entries("unet")
    second.rename(tmp_path / second.name)
    with pytest.raises(ErasecError, match=f"{second.name} is not there"):
        folder.entries("unet")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"x": first.name, "y": f"../{second.name}"}}))
    with pytest.raises(ErasecError, match="is not there"):
        folder.entries("unet")
    (tmp_path / index).write_text("[]")
    with pytest.raises(ErasecError, match="no index of shards"):
        folder.entries("unet")
