"""Stable Diffusion 1.4 and SDXL at full size, with random weights: minutes and gigabytes, so marked slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import random_models

from erasec.checkpoint.safetensors import file_digest
from erasec.model import loading

pytestmark = pytest.mark.slow

# Runs a command line of erasec and tells the peak of its memory, in bytes: ru_maxrss would begin at that of the tests.
MEASURED = (
    "import re, sys; from erasec import cli\n"
    "try: cli.app(sys.argv[1:], standalone_mode=False)\n"
    "finally: peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()); "
    "print('PEAK', int(peak[1]) * 1024, file=sys.stderr)"
)


def run(*words: object) -> int:
    """Peak memory of ``erasec WORDS``, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(next(line for line in done.stderr.splitlines() if line.startswith("PEAK")).split()[1])


@pytest.fixture(scope="module")
def sd14(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd14") / "sd14"
    random_models.random_folder(folder, "sd1", "full", dtype="float32")
    return folder


def test_a_whole_build_of_sd14_stays_below_4_gb_and_an_edit_below_600_mb(sd14: Path, tmp_path: Path) -> None:
    """The build encodes prompts, solves, merges and writes folder, single file, LoRA and edit; apply only merges.

    Pictures are left out: they need all weights in memory, which are 4.3 GB.
    """
    targets = ("--target", "ldm", "--target", "lora:rank=16", "--target", "edit")
    peak = run(
        "build",
        sd14,
        "--erase",
        "golf-ball",
        "--erase",
        "church",
        *targets,
        "--pictures",
        "0",
        "--out",
        tmp_path / "out",
    )
    assert peak < 4e9
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["moves"]) == 32
    edit = next((tmp_path / "out" / "edit").iterdir())
    unet = Path("unet/diffusion_pytorch_model.safetensors")
    assert run("apply", edit, sd14, "--out", tmp_path / "applied", "--link") < 600e6
    assert file_digest(tmp_path / "applied" / unet) == file_digest(tmp_path / "out" / "hf" / unet)
    single = tmp_path / "out" / "ldm" / "model.safetensors"
    assert loading.load(str(single)).family.name == "sd1"
    os.unlink(tmp_path / "applied" / unet)
    assert (sd14 / unet).is_file()


def test_sd14_becomes_graphs_engines_and_a_model_repository(sd14: Path, tmp_path: Path) -> None:
    """The engines are real, built with or without a GPU; the peak is of the build's own process, not the builders'."""
    pytest.importorskip("tensorrt_rtx")
    targets = ("--target", "onnx", "--target", "edit:tensors=true", "--target", "trt-rtx", "--target", "triton")
    peak = run("build", sd14, "--erase", "golf-ball", *targets, "--link", "--pictures", "0", "--out", tmp_path / "out")
    assert peak < 24e9
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"])
    assert {"weights/unet", "parity/unet", "engine/unet/source", "engine/unet/text"} <= {
        check["name"] for check in report["checks"]
    }
    apart = tmp_path / "out/onnx/unet/model.edited.onnx_data"
    assert apart.stat().st_size == 4 * 19_169_280
    (edit,) = (tmp_path / "out/edit").iterdir()
    assert run("relink", tmp_path / "out/onnx", edit, "--out", tmp_path / "again", "--link") < 300e6
    assert file_digest(tmp_path / "again/unet/model.edited.onnx_data") == file_digest(apart)


def test_sdxl_is_solved_and_edited(tmp_path: Path) -> None:
    random_models.random_folder(tmp_path / "sdxl", "sdxl", "full", dtype="float16")
    (tmp_path / "small.toml").write_text(
        'name = "ball"\nerase = ["golf ball"]\nanchor = "apple"\nkeep = ["tennis ball"]\ntemplates = ["{}", "a {}"]\n'
    )
    flags = (
        "--erase",
        tmp_path / "small.toml",
        "--target",
        "edit",
        "--link",
        "--pictures",
        "0",
        "--out",
        tmp_path / "out",
    )
    run("build", tmp_path / "sdxl", *flags)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["moves"]) == 140
    assert {move["shape"][1] for move in report["moves"]} == {2048}
    assert run("apply", next((tmp_path / "out" / "edit").iterdir()), tmp_path / "sdxl", "--in-place") < 900e6
    unet = Path("unet/diffusion_pytorch_model.safetensors")
    assert file_digest(tmp_path / "sdxl" / unet) == file_digest(tmp_path / "out" / "hf" / unet)


@pytest.mark.parametrize("name", ["esd", "kpop", "safegen", "trce.steer", "few_shot", "geom_erasing"])
def test_two_steps_of_a_learned_pass_stay_below_14_gb(root: Path, tmp_path: Path, name: str) -> None:
    """Float32 on the CPU, batch 1, latents 64 x 64: what tests/benchmarks/passes_scale.py measures, again."""
    script, out = root / "tests/benchmarks/passes_scale.py", tmp_path / "found.json"
    subprocess.run([sys.executable, str(script), "--passes", name, "--out", str(out)], check=True)
    row = json.loads(out.read_text())["rows"][name]
    assert row["stats"]["steps"] == 2
    assert 4 < row["peak_gb"] <= 14  # the UNet alone has 3.4 GB


def test_the_rehearsal_of_the_whole_line_stays_below_16_gb(root: Path, tmp_path: Path) -> None:
    """Nudity out of Stable Diffusion 1.4 by the default pass, with graphs and engines, in one command."""
    targets = ["onnx", *(["trt-rtx"] if find_spec("tensorrt_rtx") else [])]
    script, out = root / "tests/benchmarks/rehearsal.py", tmp_path / "found.json"
    words = ["--targets", *targets, "--scratch", str(tmp_path), "--out", str(out)]
    subprocess.run([sys.executable, str(script), *words], check=True)
    found = json.loads(out.read_text())
    assert {"solve", "merge and write", "export hf", "report", *(f"export {name}" for name in targets)} <= set(
        found["phases"]
    )
    assert all(0.5 < row["peak_gb"] < 16 for row in found["phases"].values())
    assert max(row["peak_gb"] for row in found["phases"].values()) > 3.4  # the UNet alone
    assert found["report"]["page_bytes"] > 10_000 and found["report"]["pairs"] == 4
    # Pictures of random weights show nothing that NudeNet knows, so that there is nothing to erase. All else passes.
    assert found["report"]["failed"] == (["erased/name", "erased/synonym"] if find_spec("nudenet") else [])
