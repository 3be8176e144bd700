"""Pictures from the pipelines of all families: their class, their size, their type of numbers, and their batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import random_models
import torch

from erasec.attention.pipeline import generate, paint, pipeline
from erasec.attention.sampling import PIPELINES, Sampling, unsupported
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, write_extras

PROMPTS, SEEDS = ["a photo of a red heart", "a blue ring", "a green star", "a circle", "a cross"], [1, 2, 3, 4, 5]
QUICK = Sampling(2, 3.0)


def test_a_batch_that_is_too_large_is_halved_and_the_pictures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, call, sizes = loading.bundled_folder("glyphs"), diffusers.StableDiffusionPipeline.__call__, list[int]()
    wanted = generate(folder, PROMPTS, SEEDS, QUICK, "")

    def small(self: Any, prompts: list[str], **more: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, prompts, **more)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", small)
    batches = list(paint(folder, PROMPTS, SEEDS, QUICK, ""))
    assert sizes == [5, 2, 2, 1] and [len(batch) for batch in batches] == [2, 2, 1]
    assert np.abs(np.concatenate(batches).astype(int) - wanted).max() <= 2
    swapped = generate(folder, PROMPTS, SEEDS[::-1], QUICK, "")
    assert np.abs(swapped.astype(int) - wanted).max() > 20  # negative control: another seed is another picture


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_families_are_painted_by_their_own_pipelines(family: str, tmp_path: Path) -> None:
    random_models.random_folder(tmp_path, family)
    pictures = generate(tmp_path, PROMPTS[:2], SEEDS[:2], Sampling(1, 3.0, side=64), "")
    assert pictures.shape == (2, 64, 64, 3) and pictures.std() > 1
    assert type(pipeline(tmp_path)).__name__ == json.loads((tmp_path / "model_index.json").read_text())["_class_name"]


def test_pictures_are_reduced_to_a_side_and_never_enlarged() -> None:
    folder = loading.bundled_folder("glyphs")
    shapes = [generate(folder, PROMPTS[:1], SEEDS[:1], Sampling(1, 1.0, side=side), "").shape for side in (0, 512, 64)]
    assert shapes == [(1, 64, 64, 3)] * 3


def test_half_precision_is_close_and_not_the_same(tmp_path: Path) -> None:
    """With a memory, whose rows must have the type of the weights."""
    folder = Path(shutil.copytree(loading.bundled_folder("glyphs"), tmp_path / "model"))
    rows = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(0))
    write_extras(folder, Extras((Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *rows),)))
    exact, half = (
        generate(folder, PROMPTS[:2], SEEDS[:2], Sampling(2, 3.0, dtype=dtype), "").astype(int)
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(exact - half).mean() < 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StableDiffusionInpaintPipeline", "needs an image"),
        ("StableDiffusionXLImg2ImgPipeline", "needs an image"),
        ("os.system", "erasec runs"),
        (["diffusers", "Mine"], "erasec runs"),
    ],
)
def test_a_pipeline_that_is_not_of_a_prompt_alone_is_not_opened(name: Any, words: str, tmp_path: Path) -> None:
    assert words in unsupported(name)
    folder = Path(shutil.copytree(loading.bundled_folder("glyphs"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(ErasecError, match="prompt alone") as caught:
        pipeline(folder)
    assert words in caught.value.why


def test_every_pipeline_that_is_opened_exists() -> None:
    assert [unsupported(name) for name in PIPELINES] == [""] * 4
    assert all(issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline) for name in PIPELINES)


def test_a_model_that_does_not_fit_into_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "to", full)
    with pytest.raises(ErasecError, match="does not fit into the memory") as caught:
        generate(loading.bundled_folder("glyphs"), PROMPTS[:1], SEEDS[:1], QUICK, "")
    assert "--pictures 0" in caught.value.fix
