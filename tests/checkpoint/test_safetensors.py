"""Reading and writing safetensors: only the given tensors change, files are complete or absent, bytes are stable."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasec.checkpoint import safetensors as checkpoint
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
    checkpoint.save_tensors(tmp_path / "x.safetensors", tensors(), {"zeta": "1", "alpha": "2"})
    entries, metadata = checkpoint.read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "zeta": "1", "alpha": "2"}
    library = load_file(tmp_path / "x.safetensors")
    for key, tensor in tensors().items():
        assert torch.equal(checkpoint.read_tensor(entries[key]), tensor), key
        assert torch.equal(library[key], tensor), key


def test_same_content_same_bytes_in_any_order(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(12)}
    checkpoint.save_tensors(tmp_path / "x", tensors(), metadata)
    checkpoint.save_tensors(tmp_path / "y", dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    odd = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(1).half(), "y": torch.ones(3)}
    content = {**tensors(), **odd, "z": torch.ones(1).double()}
    checkpoint.save_tensors(tmp_path / "x", content)
    entries, _ = checkpoint.read_header(tmp_path / "x")
    sizes = {key: tensor.element_size() for key, tensor in content.items()}
    assert [entry.start % sizes[key] for key, entry in entries.items()] == [0] * len(content)
    assert list(entries) == sorted(content, key=lambda key: (-sizes[key], key))
    by_key, at = [], 0
    for key, tensor in sorted(content.items()):
        by_key.append(at % sizes[key])
        at += tensor.nbytes
    assert any(by_key)  # by key alone, some do not
    assert all(torch.equal(value, content[key]) for key, value in load_file(tmp_path / "x").items())


def test_patch_moves_the_named_tensor_and_not_one_other_byte(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base", metadata={"format": "pt"})
    checkpoint.patch_file(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: tensors()["b.weight"] + 1})
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
        checkpoint.patch_file(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: wrong})
    assert os.listdir(tmp_path) == ["base"]


def test_a_patch_that_came_out_with_another_layout_is_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_tensors(tmp_path / "base", tensors())
    whole = checkpoint._copy

    def damaging_copy(source: Any, target: Any, start: int, stop: int) -> None:
        whole(source, target, start, stop)
        if start == 0:
            os.pwrite(target.fileno(), b"I", os.pread(target.fileno(), 400, 0).index(b'"F16"') + 1)

    monkeypatch.setattr(checkpoint, "_copy", damaging_copy)
    with pytest.raises(ErasecError, match="not written as base is"):
        checkpoint.patch_file(tmp_path / "base", tmp_path / "out", {"b.weight": lambda: torch.zeros(5, 3)})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_failure_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base")
    (tmp_path / "new").write_bytes(b"old")

    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.patch_file(tmp_path / "base", tmp_path / "new", {"b.weight": fail})
    assert (tmp_path / "new").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["base", "new"]


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "length", "empty"])
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save_tensors(path, tensors())
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[:-3],
            "longer": data + b"x",
            "header": data[:8] + b"{{" + data[10:],
            "length": (10**12).to_bytes(8, "little") + data[8:],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ErasecError, match="no whole safetensors file"):
        checkpoint.read_header(path)


def test_a_dtype_that_is_not_read_is_no_damage(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(ErasecError, match="holds tensors of the dtype C64") as caught:
        checkpoint.read_header(tmp_path / "x.safetensors")
    assert "BF16" in caught.value.why and "float16 or float32 file" in caught.value.fix
    save_file({"x": torch.ones(4).half()}, tmp_path / "x.safetensors")
    assert checkpoint.read_header(tmp_path / "x.safetensors")[0]["x"].dtype == "F16"


def test_content_digest_ignores_layout_and_sees_one_bit(tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "ours", tensors())
    save_file(tensors(), tmp_path / "theirs", metadata={"format": "pt", "more": "words"})
    changed = tensors()
    changed["c.bias"][3] += 1
    checkpoint.save_tensors(tmp_path / "changed", changed)
    ours, theirs, other = (
        checkpoint.content_digest(checkpoint.read_header(tmp_path / name)[0]) for name in ("ours", "theirs", "changed")
    )
    assert ours == theirs != other


def test_the_bytes_of_a_file_are_these(tmp_path: Path) -> None:
    content = {
        "b.weight": torch.arange(15.0).reshape(5, 3),
        "a.weight": torch.arange(8).reshape(4, 2).half(),
        "é": torch.zeros(0, 4),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.arange(7).bfloat16(),
    }
    checkpoint.save_tensors(tmp_path / "x", content, {"zeta": "1", "alpha": "ü"})
    golden = "075d7b04c58453bd228ec8c6d1984d438d0be79fc40c81a2a796f0769775ba67"
    assert checkpoint.file_digest(tmp_path / "x") == golden
    checkpoint.save_tensors(tmp_path / "y", {**content, "c": content["c"] + 1}, {"zeta": "1", "alpha": "ü"})
    assert checkpoint.file_digest(tmp_path / "y") != golden


def test_stream_makes_one_tensor_at_a_time_in_order(tmp_path: Path) -> None:
    order: list[str] = []

    def make(key: str) -> torch.Tensor:
        order.append(key)
        return torch.full((2, 3), float(len(order)))

    checkpoint.stream_tensors(tmp_path / "x", {key: ("F32", (2, 3), partial(make, key)) for key in "cab"})
    assert order == ["a", "b", "c"]
    assert {key: float(value[0, 0]) for key, value in load_file(tmp_path / "x").items()} == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(("dtype", "shape"), [("F16", (2, 3)), ("F32", (3, 2))])
def test_stream_refuses_another_dtype_or_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ErasecError, match="the new x is float32"):
        checkpoint.stream_tensors(tmp_path / "x", {"x": (dtype, shape, lambda: torch.zeros(2, 3))})
    with pytest.raises(ErasecError, match="complex64 cannot be written"):
        checkpoint.save_tensors(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []


def test_a_transposed_entry_is_read_and_digested_as_the_tensor_it_stands_for(tmp_path: Path) -> None:
    matrix = tensors()["b.weight"]
    checkpoint.save_tensors(tmp_path / "plain", {"x": matrix})
    checkpoint.save_tensors(tmp_path / "turned", {"x": matrix.T.contiguous()})
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
    checkpoint.patch_file(tmp_path / "base", tmp_path / "expected", {"b.weight": lambda: torch.ones(5, 3)})
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
    checkpoint.patch_file(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: torch.ones(5, 3)})
    checkpoint.copy_file(tmp_path / "base", tmp_path / "copy")
    assert (tmp_path / "new").read_bytes() == (tmp_path / "expected").read_bytes()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "base").read_bytes()
    assert calls > 20 or fault in ("none", "missing")


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base")

    def shrink() -> torch.Tensor:
        os.truncate(tmp_path / "base", 200)
        return torch.ones(5, 3)

    with pytest.raises(ErasecError, match="bytes early"):
        checkpoint.patch_file(tmp_path / "base", tmp_path / "new", {"b.weight": shrink})
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    content = {"a": torch.ones(3), "b": torch.tensor([0.0, value], dtype=torch.bfloat16), "c": torch.ones(2).long()}
    checkpoint.save_tensors(tmp_path / "some.safetensors", content)
    check = checkpoint.finite_check("some/finite", checkpoint.read_header(tmp_path / "some.safetensors")[0])
    bad = value != 1.0
    assert (check.name, check.value, check.limit, check.passed) == ("some/finite", float(bad), 0.0, not bad)
    assert "all 2 floating tensors" in check.how
    assert check.how.endswith("the first is b") == bad


F32 = '{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}'
WHOLE = F32 % (16, 0, 64)
FORBIDDEN_HEADERS = {
    "overlapping offsets": f'{{"a":{F32 % (8, 0, 32)},"b":{F32 % (12, 16, 64)}}}',
    "shared bytes": f'{{"a":{WHOLE},"b":{WHOLE}}}',
    "a hole": f'{{"a":{F32 % (4, 0, 16)},"b":{F32 % (8, 32, 64)}}}',
    "shifted offsets": f'{{"a":{F32 % (15, 4, 64)}}}',
    "trailing bytes": f'{{"a":{F32 % (8, 0, 32)}}}',
    "another size than the shape": f'{{"a":{F32 % (15, 0, 64)}}}',
    "a name twice": f'{{"a":{WHOLE},"a":{WHOLE}}}',
    "metadata twice": f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{WHOLE}}}',
    "metadata that is a number": f'{{"__metadata__":{{"x":1}},"a":{WHOLE}}}',
    "metadata that is a list": f'{{"__metadata__":[],"a":{WHOLE}}}',
    "an entry that is a list": '{"a":["F32",[16],[0,64]]}',
    "an entry without a dtype": '{"a":{"shape":[16],"data_offsets":[0,64]}}',
    "a shape that is a float": '{"a":{"dtype":"F32","shape":[16.0],"data_offsets":[0,64]}}',
    "three offsets": '{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64,64]}}',
    "deep nesting": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
}


def write_header(path: Path, header: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    return path


@pytest.mark.parametrize("name", FORBIDDEN_HEADERS)
def test_a_header_that_the_format_forbids_is_refused(tmp_path: Path, name: str) -> None:
    allowed = write_header(tmp_path / "allowed", f'{{"a":{WHOLE}}} '.encode())
    assert checkpoint.read_header(allowed)[0]["a"].shape == (16,)
    with pytest.raises(ErasecError, match="no whole safetensors file") as caught:
        checkpoint.read_header(write_header(tmp_path / "x", FORBIDDEN_HEADERS[name].encode()))
    assert caught.value.why and "__init__" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_a_header_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ErasecError, match="no whole safetensors file"):
        checkpoint.read_header(write_header(tmp_path / "x", f'{{"a":{WHOLE}}}'.encode(encoding)))


def test_a_header_of_more_than_100_mb_is_refused(tmp_path: Path) -> None:
    text = f'{{"a":{WHOLE}}}'.encode()
    with (tmp_path / "x").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + text)
        file.truncate(200_000_072)
    with pytest.raises(ErasecError, match="no whole safetensors file") as caught:
        checkpoint.read_header(tmp_path / "x")
    assert caught.value.why == "header too large"


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ErasecError, match="is a Git LFS pointer") as caught:
        checkpoint.read_header(tmp_path / "x")
    assert "git lfs pull" in caught.value.fix


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "x", tensors())
    entries, _ = checkpoint.read_header(tmp_path / "x")
    os.truncate(tmp_path / "x", 300)
    with pytest.raises(ErasecError, match="no whole safetensors file"):
        checkpoint.read_tensor(entries["ids"])
