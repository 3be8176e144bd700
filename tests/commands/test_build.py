"""Whole builds: a recipe becomes a folder that other libraries load, with the same bytes each time."""

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

from erasec.attention.pipeline import Sampling, generate
from erasec.base import Check
from erasec.checkpoint import manifest
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.checkpoint.staging import output
from erasec.commands import build, plan
from erasec.errors import CheckFailed, ErasecError
from erasec.judging.painting import WORLD_STEPS
from erasec.model import loading
from erasec.model.edit import Edit
from erasec.passes.uce import Uce
from erasec.recipe import recipe
from erasec.recipe.recipe import Limits, NamedOptions, Recipe
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import PROVENANCE
from erasec.reporting.report import Report

LIMITS = Limits()
QUICK = Limits(images=2, steps=2, erased=99.0, kept=1.0, agreement=2.0)


def make(out: Path, **fields: object) -> Report:
    return build.run(plan.make_plan(Recipe(**{"model": "glyphs", "erase": ("star",), "checks": LIMITS, **fields}), out))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("build") / "out"
    return out, make(out, targets=("onnx",))


def test_star_is_gone_and_the_rest_is_there(built: tuple[Path, Report]) -> None:
    out, report = built
    assert report.outcome == "passed"
    own = {"report.html", "report.json", "README.md", "recipe.toml", BOM, PROVENANCE, manifest.FILE}
    assert {"hf", "onnx", *own} == set(os.listdir(out))
    assert manifest.compare(out, manifest.read(out)[0]).all == ()
    assert {check.name for check in report.checks} >= {
        "erased/name",
        "erased/synonym",
        "erased/implicit",
        "kept/hits",
    }
    assert sorted(os.listdir(out.parent)) == ["out"]
    deployed = {check.name: check.value for check in report.checks if check.name.endswith("s/onnx")}
    assert deployed["labels/onnx"] == 0
    assert deployed["pictures/onnx"] > 70


def test_only_cross_attention_keys_and_values_moved(built: tuple[Path, Report]) -> None:
    out, _ = built
    base = loading.load("glyphs")
    before, after = contents(base.source.root), contents(out / "hf")
    assert before.keys() == after.keys()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert [name for name in before if before[name] != after[name]] == [weights]
    old, new = base.source.entries("unet"), Folder(out / "hf").entries("unet")
    moved = {key for key in old if not torch.equal(read_tensor(old[key]), read_tensor(new[key]))}
    assert moved == {site.key for site in base.select("cross", "kv")}


def test_the_resolved_recipe_rebuilds_the_same_bytes(built: tuple[Path, Report], tmp_path: Path) -> None:
    out, _ = built
    again = tmp_path / "again"
    build.run(plan.make_plan(recipe.from_file(out / "recipe.toml"), again), fresh=True)
    assert contents(out / "hf") == contents(again / "hf")
    assert contents(out / "onnx") == contents(again / "onnx")
    for name in ("recipe.toml", "README.md", BOM):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    assert timeless(out) == timeless(again)


def timeless(out: Path) -> object:
    """The provenance without its times, and without the digests of the two files that state seconds."""
    statement = json.loads((out / PROVENANCE).read_text())
    assert set(statement["predicate"]["runDetails"].pop("metadata")) == {"startedOn", "finishedOn"}
    stated = [item for item in statement["subject"] if item["name"] not in ("report.json", "report.html")]
    assert len(statement.pop("subject")) == len(stated) + 2
    return statement, stated


def test_the_pipeline_makes_the_pictures_of_the_report(built: tuple[Path, Report]) -> None:
    """One at a time, as a user would, against the report's batches: the same to a level or two."""
    from diffusers import StableDiffusionPipeline

    out, report = built
    pipeline = StableDiffusionPipeline.from_pretrained(out / "hf")
    pipeline.set_progress_bar_config(disable=True)
    for pair in report.pairs[::20]:
        image = pipeline(
            pair.prompt,
            num_inference_steps=WORLD_STEPS,
            guidance_scale=LIMITS.guidance,
            generator=torch.Generator("cpu").manual_seed(pair.seed),
            output_type="np",
        ).images[0]
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


def test_an_edit_that_moves_nothing_is_an_error(random_folder: Path, tmp_path: Path) -> None:
    weak = NamedOptions(name="uce", options={"scale": 1e-12})
    with pytest.raises(ErasecError, match="pass uce changes nothing for church") as caught:
        make(tmp_path / "out", model=str(random_folder), erase=("church",), **{"pass": (weak,)})
    assert "anchor" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("component", "what"), [("text_encoder", "cannot be edited"), ("unet", "checks failed")])
def test_a_base_with_a_nan_is_blamed_by_the_name_of_the_tensor(
    random_folder: Path, tmp_path: Path, component: str, what: str
) -> None:
    base = Path(shutil.copytree(random_folder, tmp_path / "base"))
    (file,) = (base / component).glob("*.safetensors")
    entries, metadata = read_header(file)
    tensors = {key: read_tensor(entry) for key, entry in entries.items()}
    broken = next(key for key in sorted(tensors) if key.endswith(("conv_in.weight", "layers.0.mlp.fc1.weight")))
    tensors[broken].view(-1)[3] = float("nan")
    save_tensors(file, tensors, metadata)
    with pytest.raises(ErasecError, match=what) as caught:
        make(tmp_path / "out", model=str(base), erase=("church",))
    assert f"{component}/{broken} " in caught.value.why and "NaN" in caught.value.why
    assert "ridge" not in str(caught.value) and "options" not in str(caught.value)


def test_a_base_that_never_shows_the_concept_is_blamed(tmp_path: Path) -> None:
    limits = QUICK.model_copy(update={"steps": 8})
    with pytest.raises(CheckFailed, match="erased/name") as caught:
        make(tmp_path / "out", model="glyphs-never-star", checks=limits)
    assert "glyphs-never-star shows star in none of 2 pictures" in caught.value.why
    assert "the model you mean" in caught.value.fix and "options" not in caught.value.fix


def test_concepts_erased_together_are_not_painted_under_each_others_names(tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"images": 5, "steps": 8})
    report = make(tmp_path / "out", erase=("circle", "square"), checks=limits)
    checks = {check.name: check for check in report.checks}
    assert checks["erased/name"].value <= 0.1 and "shown as" not in checks["erased/name"].how
    assert [concept["anchor"] for concept in report.concepts] == ["triangle", "triangle"]
    assert sum("instead of" in note for note in report.notes) == 2
    # One after the other: the goal of the square is not the circle, which the first build erased.
    first = make(tmp_path / "first", erase=("circle",), checks=limits)
    second = make(tmp_path / "second", model=str(tmp_path / "first" / "hf"), erase=("square",), checks=limits)
    assert first.concepts[0]["anchor"] == "square"
    assert [concept["name"] for concept in second.earlier] == ["circle"]
    assert second.concepts[0]["anchor"] == "triangle"


@pytest.mark.parametrize(("value", "outcome"), [(0.1, "passed"), (0.3, "failed")])
def test_checks_of_a_pass_stand_in_the_report_and_decide(
    value: float, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks(step: Uce, edit: Edit) -> tuple[Check, ...]:
        return (Check.at_most(f"uce/{edit.concepts[0]}", value, 0.2, "what the pass measured"),)

    monkeypatch.setattr(Uce, "checks", checks)
    if outcome == "passed":
        report = make(tmp_path / "out", checks=QUICK)
        assert [check.outcome for check in report.checks if check.name == "uce/star"] == ["passed"]
    else:
        with pytest.raises(CheckFailed, match="1 of 9 checks failed: uce/star") as caught:
            make(tmp_path / "out", checks=QUICK)
        assert "what the pass measured" in caught.value.why


def test_a_rejected_build_leaves_the_earlier_one(built: tuple[Path, Report]) -> None:
    out, _ = built
    before = contents(out)
    with pytest.raises(CheckFailed):
        make(out, checks=QUICK.model_copy(update={"drift": 0.0}))
    after = contents(out)
    assert {name: data for name, data in after.items() if not name.startswith(".rejected")} == before


def test_without_a_judge_the_report_says_that_nothing_was_measured(random_folder: Path, tmp_path: Path) -> None:
    report = make(tmp_path / "out", model=str(random_folder), erase=("church",))
    assert (report.outcome, report.unjudged) == ("not judged", ("church",))
    assert "was not measured" in report.notes[0]
    assert {pair.looked_for for pair in report.pairs} == {""} and not report.rates
    assert "was not measured" in (tmp_path / "out" / "report.html").read_text()


def test_glyphs_never_star_and_two_concepts_at_once(tmp_path: Path) -> None:
    limits = QUICK.model_copy(update={"steps": 12})
    report = make(tmp_path / "out", model="glyphs-never-star", erase=("heart", "ring"), checks=limits)
    assert [item.concepts for item in report.applied] == [("heart", "ring")]


def test_unedited_copies_of_edited_weights_are_left_out_with_a_note(random_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_folder, base)
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"):
        shutil.copy(base / name.replace(".fp16", ""), base / name)
    (base / "v1-5.ckpt").write_bytes(b"pickle")
    report = make(tmp_path / "out", model=str(base), erase=("church",))
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


def test_every_target_is_made_of_the_chosen_variant(random_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_folder, tmp_path / "base")
    for file in base.glob("*/*.safetensors"):
        entries = read_header(file)[0]
        wide = {key: read_tensor(entry) for key, entry in entries.items()}
        save_tensors(file.with_suffix(".bf16.safetensors"), {k: v.bfloat16() for k, v in wide.items() if v.dim()})
    make(tmp_path / "out", model=str(base), variant="bf16", targets=("hf", "ldm"))
    single = read_header(tmp_path / "out/ldm/model.safetensors")[0]
    assert {entry.dtype for entry in single.values()} == {"BF16"}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "erasec", "build", "glyphs", "--erase", "star", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".out.erasec/stage/hf/unet/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    for _ in range(3):  # a second Ctrl-C does not interrupt the clean-up
        process.send_signal(stop)
        time.sleep(0.02)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "nothing was left behind" in message and "Traceback" not in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["solving", "writing", "checking"])
def test_a_model_that_changes_during_a_build_is_an_error_and_nothing_is_written(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    base = shutil.copytree(random_folder, tmp_path / "base")
    module, name = {
        "solving": (build, "_solve"),
        "writing": (build, "write_extras"),
        "checking": (build.collect, "written_files"),
    }[when]
    real = getattr(module, name)

    def changed(*given: object, **more: object) -> object:
        (base / "vae" / "config.json").write_text((base / "vae" / "config.json").read_text() + "\n")
        return real(*given, **more)

    monkeypatch.setattr(module, name, changed)
    with pytest.raises(ErasecError, match="has changed while it was read") as caught:
        make(tmp_path / "out", model=str(base), erase=("zebra",))
    assert caught.value.where == str(base / "vae" / "config.json")
    assert os.listdir(tmp_path) == ["base"]


def test_a_model_that_changes_is_named_whatever_else_fails(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(random_folder, tmp_path / "base")

    def fails(*_: object) -> None:
        (base / "vae" / "config.json").unlink()
        raise ValueError("NaN")

    monkeypatch.setattr(build, "_build", fails)
    with pytest.raises(ErasecError, match="has changed while it was read"):
        make(tmp_path / "out", model=str(base), erase=("zebra",))


def test_two_builds_into_one_folder_leave_the_first(random_folder: Path, tmp_path: Path) -> None:
    fields = {"model": str(random_folder), "erase": ("zebra",)}
    second = plan.make_plan(Recipe(**fields), tmp_path / "out")  # type: ignore[arg-type]
    with output(tmp_path / "out"), pytest.raises(ErasecError, match="another command is writing there") as caught:
        build.run(second)
    assert f"process {os.getpid()} " in caught.value.why
    assert os.listdir(tmp_path) == []
    assert build.run(second).outcome == "not judged"


def test_files_that_came_meanwhile_are_not_replaced(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build._build

    def slow(*given: object) -> Report:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_build", slow)
    with pytest.raises(ErasecError, match="out is not empty"):
        make(tmp_path / "out", model=str(random_folder), erase=("zebra",))
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine"]


def test_modes_follow_the_umask(random_folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "out", model=str(random_folder), erase=("zebra",), targets=("ldm", "edit", "lora", "onnx"))
    finally:
        os.umask(before)
    modes = {
        (path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))
    }
    assert modes == {(True, 0o750), (False, 0o640)}


def test_a_seed_decides_the_pictures_whatever_the_batch() -> None:
    prompts = ["a photo of a red heart", "a blue ring", "a green star"]
    sampling, base = Sampling(3, 4.0), loading.bundled_folder("glyphs")
    together = generate(base, prompts, [1, 2, 3], sampling, "")
    alone = generate(base, prompts[2:], [3], sampling, "")
    other = generate(base, prompts[2:], [4], sampling, "")
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 2
    assert np.abs(together[2].astype(int) - other[0]).max() > 20


# A judge that knows every model and sees in a picture whatever it looks for.
JUDGE = """
import numpy as np
from typing import ClassVar
from erasec.base import Judge, Question

class Mine(Judge):
    name: ClassVar[str] = "mine"
    summary: ClassVar[str] = "a judge of a test"
    digest = "f00d" * 16

    @classmethod
    def for_model(cls, model, tuning=False):
        return cls()

    def panel(self, concept, images, seed):
        groups = [("name", "a star", "star"), ("keep", "a heart", "heart")]
        return tuple(Question(group, prompt, seed + n, label) for group, prompt, label in groups for n in range(images))

    def sees(self, images, labels):
        return np.ones(len(images), bool)

    def agreement(self, images, prompts):
        return np.zeros(len(images))
"""


def test_a_judge_from_a_file_decides_the_checks(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    fields = {"model": str(random_folder), "judge": f"{tmp_path / 'mine.py'}:Mine"}
    report = make(tmp_path / "out", **fields, checks=QUICK)
    checks = {check.name: check for check in report.checks}
    assert checks["erased/name"].value == 1.0 and checks["kept/hits"].value == 0.0
    assert checks["erased/name"].how.count("mine (sha256 f00df00df00d)") == 1
    assert [(pair.group, pair.prompt, pair.seed) for pair in report.pairs] == [
        ("name", "a star", 0),
        ("name", "a star", 1),
        ("keep", "a heart", 0),
        ("keep", "a heart", 1),
    ]
    assert f'judge = "{tmp_path / "mine.py"}:Mine"' in (tmp_path / "out" / "recipe.toml").read_text()
    with pytest.raises(CheckFailed, match="erased/name"):
        make(tmp_path / "failed", **fields, checks=QUICK.model_copy(update={"erased": 0.5}))
    assert "erased/name" not in {check.name for check in make(tmp_path / "none", model=str(random_folder)).checks}


@pytest.mark.slow
def test_one_of_several_processes_writes(random_folder: Path, tmp_path: Path) -> None:
    code = "import sys; from accelerate.commands.launch import main; sys.argv[0] = 'accelerate'; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "erasec",
        "build",
        str(random_folder),
        "--erase",
        "star",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "out"),
        str(tmp_path / "out" / "report.html"),
        "not judged: no judge can see star in these pictures; of what could be checked nothing failed (2 checks)",
    ]
    assert os.listdir(tmp_path) == ["out"]
    make(tmp_path / "alone", model=str(random_folder), device="cpu")
    assert contents(tmp_path / "alone" / "hf") == contents(tmp_path / "out" / "hf")
