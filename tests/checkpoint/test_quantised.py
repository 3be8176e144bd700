"""Quantised files are recognised by their first bytes or their header, and refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erasec.errors import ErasecError
from erasec.model import loading

WEIGHT = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
PLAIN = {WEIGHT: torch.ones(6, 2).bfloat16()}
FP8 = {
    "float8_e4m3fn": {WEIGHT: torch.ones(6, 2).to(torch.float8_e4m3fn)},
    "float8_e5m2": {WEIGHT: torch.ones(6, 2).to(torch.float8_e5m2)},
    "scaled": {
        WEIGHT: torch.ones(6, 2).to(torch.float8_e4m3fn),
        "model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        WEIGHT.replace(".weight", ".scale_weight"): torch.ones(1),
    },
}


@pytest.mark.parametrize("name", FP8)
def test_fp8_files_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file(FP8[name], file)
    with pytest.raises(ErasecError, match=r"the fp8 file .* holds quantised weights") as caught:
        loading.load(str(file))
    assert "float8_e4m3fn" in caught.value.what or name == "float8_e5m2"
    assert "an edit is smaller than the rounding" in caught.value.why
    assert "in float16, bfloat16 or float32, and quantise the result" in caught.value.fix


@pytest.mark.parametrize(
    "name", ["scaled_fp8", WEIGHT + "_scale", WEIGHT + ".absmax", WEIGHT.replace(".weight", ".scale_weight")]
)
def test_scales_show_quantised_weights_of_any_dtype(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({WEIGHT: torch.ones(6, 2).to(torch.uint8), name: torch.ones(1)}, file)
    with pytest.raises(ErasecError, match=r"which has the scales .* holds quantised weights") as caught:
        loading.load(str(file))
    assert name in caught.value.what and "quantise the result" in caught.value.fix


def test_a_gguf_file_is_refused_whatever_its_name(tmp_path: Path) -> None:
    for name in ("flux1-dev-Q4_0.gguf", "model.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(60))
        with pytest.raises(ErasecError, match=r"the GGUF file .* holds quantised weights") as caught:
            loading.load(str(tmp_path / name))
        assert name in caught.value.what


def test_other_files_are_not_taken_for_quantised_ones(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(PLAIN, file)
    with pytest.raises(ErasecError, match="no single-file checkpoint"):
        loading.load(str(file))
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(60))
    with pytest.raises(ErasecError, match="is no checkpoint"):
        loading.load(str(tmp_path / "model.gguf"))
