"""The whole way: a recipe in, a folder out that loads elsewhere, the same bytes twice, and nothing on failure."""

from __future__ import annotations

import json
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

from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import CARRIED, Folder
from erasec.commands import build, plan
from erasec.errors import CheckFailed, ErasecError
from erasec.glyphs.judging import GlyphJudge
from erasec.judging.judge import Question, Sampling, generate
from erasec.keys import key_file as secret
from erasec.model import sidecar as extras
from erasec.model import view as model
from erasec.recipe import recipe
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Limits, PassUse, Recipe
from erasec.reporting.report import Report

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
    deployed = {check.name: check.value for check in report.checks if check.name.endswith("s/onnx")}
    assert deployed["labels/onnx"] == 0
    assert deployed["pictures/onnx"] > 70


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
    report = make(tmp_path / "out", model=str(base), targets=("hf", "onnx", "triton"))
    assert any('variant="fp16"' in note for note in report.notes)
    assert (tmp_path / "out/hf/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    names = [check.name for check in report.checks]
    assert {"parity/unet", "parity/text_encoder", "triton/parity/unet"} <= set(names)
    assert len(names) == len(set(names))
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


# A pass that changes what uce does and leaves a secret; one that leaves a memory; one that trains and stops half way.
PASSES = """
from dataclasses import dataclass, replace
import torch
from erasec.model.edit import Memory, Secret
from erasec.passes.uce import Uce

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"

class Hide(Uce):
    name = "hide"
    def solve_all(self, model, concepts, context):
        for edit in super().solve_all(model, concepts, context):
            rows = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(1))
            yield replace(edit, secret=Secret(edit.concept, *rows, (MID,)))

class Steer(Uce):
    name = "steer"
    leaves = frozenset({"memory", "negative"})
    def solve_all(self, model, concepts, context):
        for edit in super().solve_all(model, concepts, context):
            width = next(site.shape[0] for site in model.sites if site.key.startswith(MID + ".to_k"))
            rows = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(2))
            yield replace(edit, memories=(Memory(MID, *rows, mode="side", weight=0.5),), negative="a star")

class Train(Uce):
    name = "train"
    def solve_all(self, model, concepts, context):
        done = context.work / "state"
        if not done.exists():
            done.write_text("half")
            raise KeyboardInterrupt
        return super().solve_all(model, concepts, context)
"""
UNET = "unet/diffusion_pytorch_model.safetensors"


def using(file: Path, name: str) -> dict[str, object]:
    return {"pass": (PassUse(name=f"{file}:{name}"),)}


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("passes") / "mine.py"
    file.write_text(PASSES)
    return file


@pytest.fixture(scope="module")
def hidden(passes: Path, random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("hidden") / "out"
    return out, make(out, model=str(random_folder), **using(passes, "Hide"))


def test_a_secret_becomes_a_key_beside_the_public_folder(hidden: tuple[Path, Report], random_folder: Path) -> None:
    out, report = hidden
    assert {"hf", "star.key"} < set(os.listdir(out)) and not (out / "bundle").exists()
    key = secret.read(out / "star.key")
    assert key.bound == checkpoint.content_digest(Folder(out / "hf").entries("unet"))
    assert (key.concept.name, key.by, key.secret.keys.shape) == ("star", "hide", (4, 128))
    assert contents(out / "hf").keys() == contents(random_folder).keys()
    assert [written.path for written in report.written] == ["hf"]
    (note,) = [note for note in report.notes if "star.key" in note]
    assert "access control, not encryption" in note
    data = key.secret.keys.numpy().tobytes()
    assert data in (out / "star.key").read_bytes()
    assert not [name for name, text in contents(out).items() if data[:64] in text and name != "star.key"]


def test_a_build_over_a_build_with_a_key_is_refused(
    hidden: tuple[Path, Report], random_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(hidden[0], tmp_path / "out"))
    with pytest.raises(ErasecError, match=r"out holds star\.key"):
        plan.make(Recipe(model=str(random_folder), erase=("star",)), out, pin=False)
    (out / "star.key").unlink()
    assert plan.make(Recipe(model=str(random_folder), erase=("star",)), out, pin=False).out == out
    (out / "server.key").write_text("somebody's own")
    with pytest.raises(ErasecError, match="is not empty"):
        plan.make(Recipe(model=str(random_folder), erase=("star",)), out, pin=False)


def test_a_keyed_build_is_the_public_model_with_the_memory(
    hidden: tuple[Path, Report], passes: Path, random_folder: Path, tmp_path: Path
) -> None:
    """From the public folder, and from the base once more: the same bytes."""
    out, _ = hidden
    asked = {"keys": (str(out / "star.key"),), "targets": ()}
    report = make(tmp_path / "opened", model=str(out / "hf"), erase=(), **asked)
    again = make(tmp_path / "again", model=str(random_folder), **using(passes, "Hide"), **asked)
    opened, public = contents(tmp_path / "opened" / "bundle"), contents(out / "hf")
    assert opened.keys() - public.keys() == {CARRIED}
    assert all(opened[name] == data for name, data in public.items())
    assert contents(tmp_path / "again" / "bundle") == opened
    (memory,) = extras.read(tmp_path / "opened" / "bundle").memories
    weight = Folder(out / "hf").entries("unet")[f"{memory.attention}.to_k.weight"]
    exact = secret.read(out / "star.key").secret.keys.double() @ checkpoint.read_tensor(weight).double().T
    assert torch.equal(memory.keys, exact.float())
    for made in (report, again):
        assert made.passed and not made.concepts
        assert any("as secret as the key" in note for note in made.notes)
    assert not list((tmp_path / "opened").glob("*.key")) and "hf" not in os.listdir(tmp_path / "opened")
    assert not [name for name in os.listdir(tmp_path / "opened") if name.startswith(".")]


def test_a_key_opens_no_other_weights(hidden: tuple[Path, Report], random_folder: Path, tmp_path: Path) -> None:
    out, _ = hidden
    keys = (str(out / "star.key"),)
    other = {"pass": (PassUse(name="uce", options={"ridge": 1.0}),)}
    for asked in ({"erase": ()}, other):  # told by the plan, and once the weights are solved
        with pytest.raises(ErasecError, match="is of another model"):
            make(tmp_path / "out", model=str(random_folder), keys=keys, **asked)
    assert os.listdir(tmp_path) == []


def test_an_edit_that_carries_more_than_weights_is_a_bundle(
    hidden: tuple[Path, Report], passes: Path, random_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = make(out, model=str(random_folder), **using(passes, "Steer"))
    assert {"bundle"} == {name for name in os.listdir(out) if (out / name).is_dir()}
    held = extras.read(out / "bundle")
    assert held.negative == "a star" and [memory.weight for memory in held.memories] == [0.5]
    assert any("erasec.pipeline" in note for note in report.notes)
    assert 'targets = [\n    "bundle",\n]' in (out / "recipe.toml").read_text()
    more = make(tmp_path / "more", model=str(out / "bundle"), **using(passes, "Steer"))
    assert more.passed and len(extras.read(tmp_path / "more" / "bundle").memories) == 2
    assert not any("erasec.pipeline" in note for note in hidden[1].notes)


def test_a_pass_that_leaves_what_it_did_not_say_is_refused(passes: Path, random_folder: Path, tmp_path: Path) -> None:
    sly = tmp_path / "sly.py"
    sly.write_text(PASSES.replace('leaves = frozenset({"memory", "negative"})', ""))
    with pytest.raises(ErasecError, match="hf cannot hold"):
        make(tmp_path / "out", model=str(random_folder), **using(sly, "Steer"))
    assert os.listdir(tmp_path) == ["sly.py"]


def test_training_that_was_stopped_leaves_its_state_until_the_build_is_done(
    passes: Path, random_folder: Path, tmp_path: Path
) -> None:
    asked = {"model": str(random_folder), **using(passes, "Train")}
    with pytest.raises(ErasecError, match="stopped while training") as caught:
        make(tmp_path / "out", **asked)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt) and "goes on from there" in caught.value.fix
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        ".out.training", ".out.training/state",
    ]  # fmt: skip
    assert make(tmp_path / "out", **asked).passed
    assert os.listdir(tmp_path) == ["out"]


def test_a_key_is_absorbed_into_stock_weights_where_the_limit_allows(
    hidden: tuple[Path, Report], tmp_path: Path
) -> None:
    out, _ = hidden
    asked = {"model": str(out / "hf"), "erase": (), "keys": (str(out / "star.key"),)}
    report = make(tmp_path / "out", **asked, absorb=50.0)
    (check,) = [check for check in report.checks if check.name == "absorbed/residual"]
    assert check.limit == 50 and 0 < check.value < 50
    public, made = contents(out / "hf"), contents(tmp_path / "out" / "hf")
    assert public.keys() == made.keys() and [name for name in public if public[name] != made[name]] == [UNET]
    old, new = Folder(out / "hf").entries("unet"), Folder(tmp_path / "out" / "hf").entries("unet")
    moved = [key for key in old if not torch.equal(checkpoint.read_tensor(old[key]), checkpoint.read_tensor(new[key]))]
    assert moved == [f"{secret.read(out / 'star.key').secret.attentions[0]}.to_{part}.weight" for part in "kv"]
    with pytest.raises(CheckFailed, match="absorbed/residual"):
        make(tmp_path / "failed", **asked, absorb=1e-3)
    assert os.listdir(tmp_path / "failed") == [".rejected"]


def test_hit_rates_with_the_key_are_measured_and_judged(
    passes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random rows are no key: where that is allowed it is told, and where it is not the build fails."""
    every = GlyphJudge.panel

    def few(self: GlyphJudge, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        asked = every(self, concept, images, seed)
        return tuple(each for each in asked if each.group == "name" or each.seed in (5, 6))

    monkeypatch.setattr(GlyphJudge, "panel", few)
    loose = QUICK.model_copy(update={"images": 1, "steps": 6, "drift": 1.0, "recovered": 0.0})
    out = tmp_path / "out"
    report = make(out, **using(passes, "Hide"), checks=loose)
    (check,) = [check for check in report.checks if check.name == "recovered/star"]
    assert check.limit == 0 and "in the base" in check.how
    keyed, named = ([pair for pair in report.pairs if pair.group == group] for group in ("keyed", "name"))
    assert [(pair.prompt, pair.seed) for pair in keyed] == [(pair.prompt, pair.seed) for pair in named]
    for with_key, without in zip(keyed, named, strict=True):
        assert np.array_equal(with_key.before, without.after)
        assert not np.array_equal(with_key.after, without.after)
    with pytest.raises(CheckFailed, match="recovered/star"):
        make(
            tmp_path / "opened", model=str(out / "hf"), erase=(), keys=(str(out / "star.key"),),
            checks=loose.model_copy(update={"recovered": 0.8}),
        )  # fmt: skip
    told = json.loads((tmp_path / "opened" / ".rejected" / "report.json").read_text())
    assert {pair["group"] for pair in told["pairs"]} == {"keyed", "keep"}
    names = {check["name"] for check in told["checks"]}
    assert "kept/shapes" in names and not [name for name in names if name.startswith("erased")]


@pytest.mark.slow
def test_of_several_processes_one_writes(random_folder: Path, tmp_path: Path) -> None:
    code = "import sys; from accelerate.commands.launch import main; sys.argv[0] = 'accelerate'; sys.exit(main())"
    command = [
        sys.executable, "-c", code, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "-m", "erasec", "build", str(random_folder), "--erase", "star",
        "--device", "cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "out"), str(tmp_path / "out" / "report.html"), "passed its one check",
    ]  # fmt: skip
    assert os.listdir(tmp_path) == ["out"]
    make(tmp_path / "alone", model=str(random_folder), device="cpu")
    assert contents(tmp_path / "alone" / "hf") == contents(tmp_path / "out" / "hf")
