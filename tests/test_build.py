"""The whole way: a recipe in, a folder out that loads elsewhere, the same bytes twice, and nothing on failure."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from erasec import build, checkpoint, model, plan, recipe
from erasec.errors import CheckFailed
from erasec.folder import Folder
from erasec.judge import Sampling, generate
from erasec.recipe import Limits, Recipe
from erasec.report import Report

LIMITS = Limits()
QUICK = Limits(images=2, steps=2, erased=99.0, kept=1.0, agreement=2.0)


def make(out: Path, **fields: object) -> Report:
    return build.run(plan.make(Recipe(**{"model": "glyphs", "erase": ("star",), "checks": LIMITS, **fields}), out))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("build") / "out"
    return out, make(out, targets=("onnx",))


def test_star_is_gone_and_the_rest_is_there(built: tuple[Path, Report]) -> None:
    out, report = built
    assert report.passed
    assert {"hf", "onnx", "report.html", "report.json", "README.md", "recipe.toml"} == set(os.listdir(out))
    assert {check.name for check in report.checks} >= {
        "erased/name",
        "erased/synonym",
        "erased/implicit",
        "kept/shapes",
    }
    assert sorted(os.listdir(out.parent)) == ["out"]


def test_only_cross_attention_keys_and_values_moved(built: tuple[Path, Report]) -> None:
    out, _ = built
    base = model.load("glyphs")
    before, after = contents(base.source.root), contents(out / "hf")
    assert before.keys() == after.keys()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert [name for name in before if before[name] != after[name]] == [weights]
    old, new = base.source.entries("unet"), Folder(out / "hf").entries("unet")
    moved = {key for key in old if not torch.equal(checkpoint.read_tensor(old[key]), checkpoint.read_tensor(new[key]))}
    assert moved == {site.key for site in base.select("cross", "kv")}


def test_the_resolved_recipe_rebuilds_the_same_bytes(built: tuple[Path, Report], tmp_path: Path) -> None:
    out, _ = built
    again = tmp_path / "again"
    build.run(plan.make(recipe.from_file(out / "recipe.toml"), again))
    assert contents(out / "hf") == contents(again / "hf")
    assert contents(out / "onnx") == contents(again / "onnx")
    assert (out / "recipe.toml").read_bytes() == (again / "recipe.toml").read_bytes()


def test_the_pipeline_makes_the_pictures_of_the_report(built: tuple[Path, Report]) -> None:
    """One at a time, as a user would, against the report's batches: the same to a level or two."""
    from diffusers import StableDiffusionPipeline

    out, report = built
    pipeline = StableDiffusionPipeline.from_pretrained(out / "hf")
    pipeline.set_progress_bar_config(disable=True)
    for pair in report.pairs[::20]:
        image = pipeline(
            pair.prompt, num_inference_steps=LIMITS.steps, guidance_scale=LIMITS.guidance,
            generator=torch.Generator("cpu").manual_seed(pair.seed), output_type="np",
        ).images[0]  # fmt: skip
        assert np.abs(np.rint(image * 255) - pair.after).max() <= 2, pair.prompt


def test_a_failed_check_rejects_the_artifact(tmp_path: Path) -> None:
    """A limit that no edit can meet: a pixel moves."""
    out = tmp_path / "out"
    with pytest.raises(CheckFailed, match="kept/drift") as caught:
        make(out, checks=QUICK.model_copy(update={"drift": 0.0}))
    assert caught.value.exit_code == 3
    assert os.listdir(out) == [".rejected"]
    assert {"hf", "report.html", "report.json"} <= set(os.listdir(out / ".rejected"))
    assert '"passed": false' in (out / ".rejected" / "report.json").read_text()


def test_a_rejected_build_leaves_the_earlier_one(built: tuple[Path, Report]) -> None:
    out, _ = built
    before = contents(out)
    with pytest.raises(CheckFailed):
        make(out, checks=QUICK.model_copy(update={"drift": 0.0}))
    after = contents(out)
    assert {name: data for name, data in after.items() if not name.startswith(".rejected")} == before


def test_another_world_says_that_nothing_was_measured(random_folder: Path, tmp_path: Path) -> None:
    report = make(tmp_path / "out", model=str(random_folder), erase=("nudity",))
    assert report.passed
    assert "was not measured" in report.notes[0]
    assert not report.pairs
    assert "was not measured" in (tmp_path / "out" / "report.html").read_text()


def test_glyphs_never_star_and_two_concepts_at_once(tmp_path: Path) -> None:
    limits = QUICK.model_copy(update={"steps": 12})
    report = make(tmp_path / "out", model="glyphs-never-star", erase=("heart", "ring"), checks=limits)
    assert [item.concept for item in report.applied] == ["heart, ring"]


def test_unedited_copies_of_edited_weights_are_left_out_and_told(random_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_folder, base)
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(base / name.replace(".fp16", ""), base / name)
    (base / "v1-5.ckpt").write_bytes(b"pickle")
    report = make(tmp_path / "out", model=str(base), erase=("nudity",))
    gone = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    gone -= {path.relative_to(tmp_path / "out" / "hf") for path in (tmp_path / "out" / "hf").rglob("*")}
    assert gone == {Path("unet/diffusion_pytorch_model.fp16.safetensors"), Path("v1-5.ckpt")}
    assert all(str(path) in report.notes[-1] for path in gone)


def test_a_folder_of_one_variant_stays_one_and_says_how_to_load_it(random_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_folder, tmp_path / "base")
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    report = make(tmp_path / "out", model=str(base), targets=("hf", "onnx"))
    assert any('variant="fp16"' in note for note in report.notes)
    assert (tmp_path / "out/hf/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    assert {"parity/unet", "parity/text_encoder"} <= {check.name for check in report.checks}
    plain = make(tmp_path / "plain", model=str(random_folder))
    assert not any("variant" in note for note in plain.notes)


def test_every_target_is_made_of_the_variant_that_was_asked_for(random_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_folder, tmp_path / "base")
    for file in base.glob("*/*.safetensors"):
        entries = checkpoint.read_header(file)[0]
        wide = {key: checkpoint.read_tensor(entry) for key, entry in entries.items()}
        checkpoint.save(file.with_suffix(".bf16.safetensors"), {k: v.bfloat16() for k, v in wide.items() if v.dim()})
    make(tmp_path / "out", model=str(base), variant="bf16", targets=("hf", "ldm"))
    single = checkpoint.read_header(tmp_path / "out/ldm/model.safetensors")[0]
    assert {entry.dtype for entry in single.values()} == {"BF16"}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "erasec", "build", "glyphs", "--erase", "star", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".out.*/hf/unet/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    process.send_signal(stop)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "nothing was left behind" in words
    assert os.listdir(tmp_path) == []


def test_a_seed_decides_the_pictures_whatever_the_batch() -> None:
    prompts = ["a photo of a red heart", "a blue ring", "a green star"]
    sampling, base = Sampling(3, 4.0), model.bundled("glyphs")
    together = generate(base, prompts, [1, 2, 3], sampling, "")
    alone = generate(base, prompts[2:], [3], sampling, "")
    other = generate(base, prompts[2:], [4], sampling, "")
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 2
    assert np.abs(together[2].astype(int) - other[0]).max() > 20
