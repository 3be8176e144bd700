"""The pipelines of optimum read what the target onnx writes. They need older libraries, in their own environment.

ERASEC_OPTIMUM_PYTHON names the interpreter of such an environment; without it, the test creates one with pip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import joint_models
import numpy as np
import pytest
import random_models

from erasec.attention import pipeline
from erasec.attention.pipeline import Sampling
from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.model import loading
from erasec.runtime.bundle import open_bundle
from erasec.targets.ort import Onnx

NEEDS = (
    "torch==2.13.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "diffusers==0.39.0",
    "onnxruntime",
    "accelerate",
)
PROMPTS = ["a photo of a red star", "a green circle on gray"]
READER = """
import json, sys
import numpy as np, torch
import optimum.onnxruntime

pipe = getattr(optimum.onnxruntime, sys.argv[4]).from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
images = pipe(
    json.loads(sys.argv[3]), num_inference_steps=6, guidance_scale=4.0, output_type="np", **json.loads(sys.argv[5]),
    generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
).images
np.save(sys.argv[2], images)
"""


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has optimum-onnx."""
    if given := os.environ.get("ERASEC_OPTIMUM_PYTHON"):
        return given
    place = tmp_path_factory.mktemp("optimum")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = str(place / "bin/python")
    for names in (NEEDS[:1], NEEDS):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *names], check=True)
    return python


@pytest.mark.network
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_pipeline_of_optimum_makes_the_pictures_that_torch_makes(
    optimum: str, precision: str, tmp_path: Path
) -> None:
    root = loading.load("glyphs").source.root
    Onnx(precision=precision).export(Folder(root), tmp_path / "onnx", Context())
    images = read(optimum, tmp_path, "ORTStableDiffusionPipeline")
    wanted = pipeline.generate(root, PROMPTS, (5, 6), Sampling(6, 4.0), "torch").astype(float)
    assert np.abs(images - wanted).max() <= (2 if precision == "fp32" else 8)
    assert np.abs(images - wanted[::-1]).max() > 50  # other pictures are far away


def read(optimum: str, root: Path, name: str, **options: int) -> np.ndarray:
    """The pictures of optimum's pipeline ``name`` for ``root``/onnx."""
    (root / "reader.py").write_text(READER)
    arguments = [root / "reader.py", root / "onnx", root / "images.npy", json.dumps(PROMPTS), name, json.dumps(options)]
    done = subprocess.run([optimum, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures: np.ndarray = np.rint(np.load(root / "images.npy") * 255)
    return pictures


@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "name", "side"),
    [
        ("sdxl", "ORTStableDiffusionXLPipeline", 64),
        ("sd3", "ORTStableDiffusion3Pipeline", 8),
        ("flux", "ORTFluxPipeline", 16),
    ],
)
def test_its_pipelines_of_other_families_make_the_pictures_of_erasec_run(
    optimum: str, family: str, name: str, side: int, tmp_path: Path
) -> None:
    model = tmp_path / "hf"
    if family == "sdxl":
        random_models.random_folder(model, family)
    else:
        joint_models.pipeline(family).save_pretrained(model)
        # The older transformers there reads CLIP's tokenizer from other files, and T5's with other settings.
        for folder in model.glob("tokenizer*"):
            file = folder / "tokenizer_config.json"
            settings = json.loads(file.read_text())
            if "T5" in settings["tokenizer_class"]:
                file.write_text(json.dumps({key: value for key, value in settings.items() if key[:5] != "extra"}))
            else:
                shutil.copytree(loading.bundled_folder("glyphs") / "tokenizer", folder, dirs_exist_ok=True)
        index = model / "model_index.json"
        index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    Onnx().export(Folder(model), tmp_path / "onnx", Context())
    images = read(optimum, tmp_path, name, height=side, width=side)
    ours = open_bundle(tmp_path / "onnx").generate(PROMPTS, (5, 6), 6, 4.0, height=side, width=side).astype(float)
    assert np.abs(images - ours).max() <= 2
    assert np.abs(images - ours[::-1]).max() > 20
