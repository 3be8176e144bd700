"""ORTStableDiffusionPipeline reads what the target onnx writes. It needs older libraries, in their own environment.

ERASEC_OPTIMUM_PYTHON names the interpreter of such an environment; without it, the test creates one with pip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from erasec.attention import pipeline
from erasec.attention.pipeline import Sampling
from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.model import loading
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
from optimum.onnxruntime import ORTStableDiffusionPipeline

pipe = ORTStableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
images = pipe(
    json.loads(sys.argv[3]), num_inference_steps=6, guidance_scale=4.0, output_type="np",
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
    (tmp_path / "reader.py").write_text(READER)
    arguments = [str(tmp_path / "onnx"), str(tmp_path / "images.npy"), json.dumps(PROMPTS)]
    done = subprocess.run([optimum, str(tmp_path / "reader.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = np.rint(np.load(tmp_path / "images.npy") * 255)
    wanted = pipeline.generate(root, PROMPTS, (5, 6), Sampling(6, 4.0), "torch").astype(float)
    assert np.abs(images - wanted).max() <= (2 if precision == "fp32" else 8)
    assert np.abs(images - wanted[::-1]).max() > 50  # other pictures are far away
