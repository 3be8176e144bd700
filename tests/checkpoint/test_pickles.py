"""Pickled checkpoints: their tensors are read or the file is refused, and no code in it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from erasec.checkpoint import pickles
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_becomes_safetensors(tmp_path: Path, wrapped: bool, legacy: bool) -> None:
    shared = torch.arange(12.0)
    state: dict[str, Any] = {"a": shared[:6].reshape(2, 3), "b": shared[3:9], "t": shared.reshape(3, 4).T, "c": shared}
    content = {"state_dict": {**state, "step": 3}, "epoch": 1, "lr": torch.ones(1)} if wrapped else {**state, "n": 2}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    pickles.from_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)
    assert sum(tensors[key].numel() for key in tensors) == 36


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "y": Malicious(tmp_path / "ran")}, tmp_path / "x.ckpt")
    with pytest.raises(ErasecError, match="cannot be read as weights alone") as caught:
        pickles.from_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert "posix.mkdir" in caught.value.why and "nothing in a pickle is run" in caught.value.why
    assert os.listdir(tmp_path) == ["x.ckpt"]
    torch.load(tmp_path / "x.ckpt", weights_only=False)  # it does run where it is let
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("data", [b"", b"no pickle at all"])
def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(ErasecError, match="cannot be read as weights alone"):
        pickles.from_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    torch.save([torch.ones(2)], tmp_path / "x.ckpt")
    with pytest.raises(ErasecError, match="holds no tensors by name"):
        pickles.from_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")


def test_an_unpickled_file_is_named_by_its_content_and_ends_with_the_process(tmp_path: Path) -> None:
    for name in ("x.ckpt", "y.pt"):
        torch.save({"x": torch.ones(2)}, tmp_path / name)
    torch.save({"x": torch.zeros(2)}, tmp_path / "z.pt")
    script = (
        "import sys; from pathlib import Path; from erasec.checkpoint.pickles import as_safetensors;"
        "files = [as_safetensors(Path(name)) for name in sys.argv[1:]]; assert all(path.is_file() for path in files);"
        "print(*files, sep=chr(10))"
    )
    (tmp_path / "y.pt").write_bytes((tmp_path / "x.ckpt").read_bytes())
    names = [str(tmp_path / name) for name in ("x.ckpt", "y.pt", "z.pt")]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    x, y, z = map(Path, done.stdout.split())
    assert x == y != z and not x.exists() and not x.parent.exists()


def test_a_folder_of_pickles_is_read_as_one_of_safetensors(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder", "vae"):
        (tmp_path / name).mkdir()
    index = {name: ["diffusers", "Any"] for name in ("unet", "text_encoder", "vae", "scheduler")} | {"a": 1}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet" / "config.json").write_text("{}")
    torch.save({"x": torch.ones(2)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    torch.save({"x": torch.ones(2).half()}, tmp_path / "unet" / "diffusion_pytorch_model.fp16.bin")
    torch.save({"step": torch.ones(2)}, tmp_path / "unet" / "optimizer.bin")
    for number, key in ((1, "x"), (2, "y")):
        torch.save({key: torch.full((2,), float(number))}, tmp_path / f"text_encoder/pytorch_model-{number}.bin")
    shards = {"metadata": {}, "weight_map": {"x": "pytorch_model-1.bin", "y": "pytorch_model-2.bin"}}
    (tmp_path / "text_encoder" / "pytorch_model.bin.index.json").write_text(json.dumps(shards))
    torch.save({"x": torch.zeros(2)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    checkpoint.save_tensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"x": torch.ones(2)})
    with pytest.raises(ErasecError, match="no safetensors weights") as caught:
        Folder(tmp_path).entries("unet")
    assert "--allow-pickle" in caught.value.fix

    out = pickles.folder_as_safetensors(tmp_path)
    folder = Folder(out)
    assert folder.index == index and folder.config("unet") == {}
    assert checkpoint.read_tensor(folder.entries("unet")["x"]).dtype == torch.float32
    fp16 = Folder(pickles.folder_as_safetensors(tmp_path, "fp16"), "fp16")
    assert checkpoint.read_tensor(fp16.entries("unet")["x"]).dtype == torch.float16
    assert sorted(fp16.entries("text_encoder")) == ["x", "y"]
    text = {key: float(checkpoint.read_tensor(entry)[0]) for key, entry in folder.entries("text_encoder").items()}
    assert text == {"x": 1.0, "y": 2.0}
    assert torch.equal(checkpoint.read_tensor(folder.entries("vae")["x"]), torch.ones(2))
    assert {path.name for path in out.rglob("*.bin")} == {"optimizer.bin"}
    assert sum(path.is_symlink() for path in out.rglob("*")) == 7


def test_legacy_shards_of_a_variant_are_converted_with_their_index(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    shard = "diffusion_pytorch_model-00001-of-00001.fp16"
    torch.save({"x": torch.ones(2).half()}, tmp_path / "unet" / f"{shard}.bin")
    index = {"metadata": {}, "weight_map": {"x": f"{shard}.bin"}}
    (tmp_path / "unet" / "diffusion_pytorch_model.bin.fp16.index.json").write_text(json.dumps(index))
    folder = Folder(pickles.folder_as_safetensors(tmp_path, "fp16"), "fp16")
    assert [path.name for path in folder.weight_files("unet")] == [f"{shard}.safetensors"]
    assert folder.weights("unet").name == "diffusion_pytorch_model.safetensors.fp16.index.json"
    assert checkpoint.read_tensor(folder.entries("unet")["x"]).dtype == torch.float16


def pickled(root: Path, *names: str, index: object = None) -> Path:
    """A diffusers folder of empty weights: a pickle among them that is opened is an error."""
    components = {Path(name).parent.as_posix() for name in names}
    index = {name: ["diffusers", "Any"] for name in components} if index is None else index
    (root / "model_index.json").write_text(json.dumps(index))
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("names", "variant", "read"),
    [
        (["unet/diffusion_pytorch_model.bin"], "", ["unet/diffusion_pytorch_model.bin"]),
        (
            ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin"],
            "",
            ["unet/diffusion_pytorch_model.bin"],
        ),
        (
            ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin"],
            "fp16",
            ["unet/diffusion_pytorch_model.fp16.bin"],
        ),
        (
            ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.bin"],
            "bf16",
            ["unet/diffusion_pytorch_model.bin"],
        ),
        (
            ["vae/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bf16.bin"],
            "",
            ["vae/diffusion_pytorch_model.bf16.bin", "vae/diffusion_pytorch_model.fp16.bin"],
        ),
        (
            [
                "unet/diffusion_pytorch_model-1.fp16.bin",
                "unet/diffusion_pytorch_model.fp16-00002-of-00002.bin",
                "unet/diffusion_pytorch_model.bin",
            ],
            "",
            ["unet/diffusion_pytorch_model.bin"],
        ),
        (
            ["unet/diffusion_pytorch_model-00001-of-00001.fp16.bin", "unet/diffusion_pytorch_model.bin"],
            "fp16",
            ["unet/diffusion_pytorch_model-00001-of-00001.fp16.bin"],
        ),
        (["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"], "", []),
        (["text_encoder/pytorch_model-00001-of-00002.bin", "text_encoder/model.safetensors.index.json"], "", []),
        (
            ["text_encoder/pytorch_model.fp16.bin", "text_encoder/model.safetensors"],
            "fp16",
            ["text_encoder/pytorch_model.fp16.bin"],
        ),
        (["safety_checker/pytorch_model.bin", "unet/optimizer.bin"], "", []),
    ],
)
def test_only_what_is_read_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], variant: str, read: list[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        pickles, "as_safetensors", lambda path: opened.append(path.relative_to(tmp_path).as_posix()) or path
    )
    out = pickles.folder_as_safetensors(pickled(tmp_path, *names), variant)
    assert sorted(opened) == sorted(read)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*.bin")}
    assert left == {name for name in names if name.startswith("safety_checker") or "optimizer" in name}


def test_a_component_that_is_not_loaded_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "text_encoder_2/pytorch_model.bin"
    for index in ({"text_encoder_2": [None, None]}, {}):
        out = pickles.folder_as_safetensors(pickled(tmp_path, name, index=index))
        assert (out / name).is_symlink()
    with pytest.raises(ErasecError, match="cannot be read as weights alone"):
        pickles.folder_as_safetensors(pickled(tmp_path, name))
