"""The model card of a build: every snippet in it runs, without a network."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from random_models import random_folder as random_layout

from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.commands import build, plan
from erasec.model.sidecar import Extras, write_extras
from erasec.recipe.recipe import Limits, Recipe
from erasec.targets.ldm import Ldm

QUICK = Limits(images=2, steps=2, erased=99.0, kept=1.0, agreement=2.0)


def as_legacy_variant(base: Path) -> None:
    """Make fp16 the only variant of a folder, and its UNet two shards, with the names that older versions gave them."""
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    file = base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    tensors = {key: read_tensor(entry) for key, entry in read_header(file)[0].items()}
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.fp16.safetensors" for number in (1, 2)]
    places = {key: shards[number % 2] for number, key in enumerate(sorted(tensors))}
    for shard in shards:
        save_tensors(file.with_name(shard), {key: tensors[key] for key in tensors if places[key] == shard})
    index = file.with_name("diffusion_pytorch_model.safetensors.fp16.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    file.unlink()


SNIPPETS = {
    "graphs": ["hf", "onnx"],
    "variant": ["hf", "ldm", "lora"],
    "bundle": ["bundle"],
    "bundled": ["hf", "ldm", "lora"],
    "single": ["hf", "ldm", "lora"],
}


@pytest.mark.parametrize("kind", SNIPPETS)
def test_every_snippet_of_the_card_runs(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    call = StableDiffusionPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", partialmethod(call, num_inference_steps=2, height=64, width=64)
    )
    base = tmp_path / "base"
    if kind == "single":
        random_layout(tmp_path / "folder", "sd1", "tiny")
        Ldm().export(Folder(tmp_path / "folder"), tmp_path, Context())
        base = tmp_path / "model.safetensors"
    else:
        shutil.copytree(random_folder, base)
    if kind == "variant":
        as_legacy_variant(base)
    if kind == "bundle":
        write_extras(base, Extras(negative="a star"))
    model = "glyphs" if kind == "bundled" else str(base)
    targets = tuple(SNIPPETS[kind][1:])
    fields = {"model": model, "erase": ("star",), "targets": targets, "variant": "fp16" * (kind == "variant")}
    build.run(plan.make_plan(Recipe(**fields, checks=QUICK), tmp_path / "out"))
    # The card has no paths of this machine: it names the base by its folder or file, which lies here.
    monkeypatch.chdir(tmp_path / "out")
    Path(base.name).symlink_to(base)
    card = Path("README.md").read_text(encoding="utf-8")
    ran = []
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        if "optimum" in block and importlib.util.find_spec("optimum") is None:
            continue
        exec(compile(block, "card", "exec"), names := dict[str, Any]())
        ran += [target for target in SNIPPETS[kind] if f'"{target}' in block and f'config="{target}' not in block]
        if "onnxruntime" not in names:
            assert names["image"].size == (64, 64)
        if '"lora"' in block:  # the change is in the weights that the pipeline runs
            assert names["pipe"].get_active_adapters()
    assert ran == SNIPPETS[kind]
    assert ("multiples of 32 pixels" in card) == ("onnx" in targets)
