"""A built folder makes the same images in every runtime as torch's pipeline does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import GRAPHS, TEXT_TO_IMAGE
from typer.testing import CliRunner

from erasec import registry
from erasec.attention.pipeline import Sampling, generate, pipeline
from erasec.base import Runtime
from erasec.checkpoint.folder import Folder
from erasec.cli.app import app
from erasec.errors import ErasecError
from erasec.graphs.link import write_onnx
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, write_extras
from erasec.runtime.backends import Component, Components, Function, OnnxRuntime
from erasec.runtime.bundle import Bundle, open_bundle
from erasec.runtime.schedulers import KINDS
from erasec.tensorrt import engines

PROMPTS, SEEDS = ("a red star", "", "a blue circle", "two green rings"), (0, 3, 2**31 + 5, 2**32 + 1)
STEPS = 4
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def carrying(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glyphs with a memory for prompted rows alone and a negative prompt, as bundle and as onnx."""
    out, draw = tmp_path_factory.mktemp("carrying"), torch.Generator().manual_seed(0)
    shutil.copytree(built / "hf", out / "bundle")
    width = Folder(out / "bundle").entries("unet")[f"{ATTENTION}.to_k.weight"].shape[0]
    keys, values = torch.randn(2, 3, width, generator=draw)
    memory = Memory(ATTENTION, keys, 20 * values, mode="side", weight=0.8, until=0.7, guided=True)
    write_extras(out / "bundle", Extras((memory,), {}, "a yellow square"))
    write_onnx(Folder(out / "bundle"), out / "onnx", names=TEXT_TO_IMAGE)
    return out


def max_difference(images: Any, others: Any) -> int:
    """The largest difference between two levels, of 255."""
    return int(np.abs(images.astype(int) - others.astype(int)).max())


@pytest.fixture(scope="module")
def expected(built: Path) -> Any:
    return generate(built / "hf", PROMPTS, SEEDS, Sampling(STEPS, 5.0), "")


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_pictures_are_those_of_the_pipeline_and_of_their_seeds(built: Path, expected: Any, backend: str) -> None:
    bundle = open_bundle(built, backend, threads=1)
    assert bundle.backend == backend
    images = bundle.generate(PROMPTS, SEEDS, STEPS, 5.0)
    assert images.shape == (4, 64, 64, 3) and images.dtype == np.uint8
    assert max_difference(images, expected) <= 2
    assert max_difference(bundle.generate(PROMPTS[:3], SEEDS[:3], STEPS, 5.0, batch=2), expected[:3]) <= 2
    assert max_difference(bundle.generate(PROMPTS[:1], (1,), STEPS, 5.0), expected[:1]) > 50
    assert max_difference(bundle.generate(PROMPTS[:1], SEEDS[:1], STEPS, 3.0), expected[:1]) > 2
    bundle.drop("unet")
    assert max_difference(bundle.generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0), expected[:1]) <= 2
    bundle.close()


def test_openvino_makes_the_same_pictures(built: Path, expected: Any, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    for name in TEXT_TO_IMAGE:
        made = openvino.convert_model(built / "onnx" / name / "model.onnx")
        openvino.save_model(made, tmp_path / "openvino" / name / "openvino_model.xml", compress_to_fp16=False)
        shutil.copy(built / "onnx" / name / "config.json", tmp_path / "openvino" / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(built / "onnx" / name, tmp_path / "openvino" / name)
    bundle = open_bundle(tmp_path, threads=1)
    assert bundle.backend == "openvino"
    assert max_difference(bundle.generate(PROMPTS, SEEDS, STEPS, 5.0), expected) <= 2
    assert max_difference(bundle.generate(PROMPTS[:1], (1,), STEPS, 5.0), expected[:1]) > 50


def test_other_schedulers_are_those_of_diffusers(built: Path, opened: Bundle) -> None:
    import diffusers

    made: Any = pipeline(built / "hf", dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    own = made.scheduler.config
    pictures = {}
    for kind, scheduler in (
        ("ddim", diffusers.DDIMScheduler.from_config(own, clip_sample=False)),
        ("euler", diffusers.EulerDiscreteScheduler.from_config(own)),
    ):
        made.scheduler = scheduler
        theirs = made(
            [PROMPTS[0]],
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            height=64,
            width=96,
            output_type="np",
            generator=[torch.Generator().manual_seed(SEEDS[0])],
        ).images
        pictures[kind] = opened.generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, height=64, width=96, scheduler=kind)
        assert pictures[kind].shape == (1, 64, 96, 3)
        assert max_difference(pictures[kind], np.rint(theirs * 255)) <= 2
    stock = opened.generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, height=64, width=96)
    assert all(max_difference(picture, stock) > 2 for picture in pictures.values())


def test_memories_and_the_negative_prompt_act_as_in_the_pipeline(carrying: Path, opened: Bundle) -> None:
    bundles = [open_bundle(carrying, backend, threads=1) for backend in ("ort", "torch")]
    assert [bundle.root for bundle in bundles] == [carrying / "onnx", carrying / "bundle"]
    for guidance in (5.0, 1.0):
        arguments: Any = PROMPTS[::2], SEEDS[::2], STEPS, guidance
        theirs = generate(carrying / "bundle", *arguments[:2], Sampling(STEPS, guidance), "")
        for bundle in bundles:
            assert max_difference(bundle.generate(*arguments), theirs) <= 2
        for one, other in zip(opened.generate(*arguments), theirs, strict=True):
            assert max_difference(one, other) > 10
    own = bundles[1].generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0)
    assert max_difference(bundles[1].generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, negative="a yellow square"), own) == 0
    assert max_difference(bundles[1].generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, negative=""), own) > 2


class Session:
    """An engine's session on a machine that has no GPU: the graph that it would be built from."""

    closed = 0

    def __init__(self, file: Path) -> None:
        self.inside = OnnxRuntime.load(file.with_name("model.onnx"), 1)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert all(len(value) <= 2 for value in inputs.values() if value.ndim)
        return self.inside.run(inputs)

    def close(self) -> None:
        Session.closed += 1


@pytest.mark.parametrize(("library", "backend"), [(engines.RTX, "trt-rtx"), (engines.TRT, "trt")])
def test_engines_are_run_through_their_session_and_within_their_profile(
    built: Path, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, backend: str
) -> None:
    shutil.copytree(built / "onnx", tmp_path / "built" / backend)
    profile = {"input": {"min": [1, 4], "opt": [1, 4], "max": [2, 4]}, "timestep": {"min": [], "opt": [], "max": []}}
    entry = {"file": "", "engine": "", "graph": "", "weights": "", "profile": profile}
    record = {
        "schema": engines.SCHEMA,
        "builder": {"name": library, "version": "1"},
        "capabilities": [],
        "components": dict.fromkeys(GRAPHS, entry),
    }
    (tmp_path / "built" / backend / engines.RECORD).write_text(json.dumps(record))
    for name in GRAPHS:
        (tmp_path / "built" / backend / name / "model.engine").touch()
    monkeypatch.setattr(engines, "Session", Session)
    bundle = open_bundle(tmp_path / "built", backend)
    assert (bundle.backend, bundle.components.batch) == (backend, 1)
    before = Session.closed
    assert max_difference(bundle.generate(PROMPTS[:2], SEEDS[:2], STEPS, 5.0), expected[:2]) <= 2
    bundle.close()
    assert Session.closed == before + 3
    other = {"trt": "trt-rtx", "trt-rtx": "trt"}[backend]
    with pytest.raises(ErasecError, match=f"nothing for the backend {other}"):
        open_bundle(tmp_path / "built" / backend, other)


def test_engines_without_a_record_do_not_disturb_other_backends(built: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").symlink_to(built / "onnx")
    (tmp_path / "trt-rtx" / "unet").mkdir(parents=True)
    (tmp_path / "trt-rtx" / "unet" / "model.engine").touch()
    for backend in ("auto", "ort"):
        assert open_bundle(tmp_path, backend).root == tmp_path / "onnx"
    with pytest.raises(ErasecError, match="no folder of engines"):
        open_bundle(tmp_path, "trt-rtx")


class Constant(Runtime):
    """A runtime from another package, of folders with a file constant.txt: it makes black images."""

    name = "constant"
    summary = "black images"
    folders = ("constant",)

    @classmethod
    def runs(cls, folder: Path) -> bool:
        return (folder / "constant.txt").is_file()

    @classmethod
    def open(cls, folder: Path, threads: int | None) -> Components:
        return Black()


class Black:
    batch = 4

    def ids(self, texts: Sequence[str]) -> Any:
        return np.zeros((len(texts), 77), np.int64)

    def open(self, name: str) -> Component:
        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            if name == "text_encoder":
                return {"last_hidden_state": np.zeros((*inputs["input_ids"].shape, 8), np.float32)}
            if name == "unet":
                return {"out_sample": np.zeros_like(inputs["sample"])}
            count, _, height, width = inputs["latent_sample"].shape
            return {"sample": np.full((count, 3, 8 * height, 8 * width), -1, np.float32)}

        return Function(run)


@pytest.fixture
def constant(built: Path, tmp_path: Path) -> Path:
    """A folder that only the runtime ``Constant`` runs."""
    folder = tmp_path / "constant"
    for name in ("unet", "vae_decoder", "scheduler"):
        (folder / name).mkdir(parents=True)
        for file in (built / "onnx" / name).glob("*.json"):
            shutil.copy(file, folder / name)
    (folder / "constant.txt").touch()
    return folder


def test_a_runtime_in_a_file_is_named_with_its_class(constant: Path) -> None:
    bundle = open_bundle(constant, f"{__file__}:Constant")
    assert bundle.generate(["a star"], [0], STEPS).tolist() == np.zeros((1, 64, 64, 3)).tolist()
    with pytest.raises(ErasecError, match="is no bundle"):
        open_bundle(constant)


@pytest.mark.parametrize("backend", ["constant", "auto"])
def test_a_runtime_of_another_package_is_found(
    constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    with pytest.raises(ErasecError, match="is no bundle" if backend == "auto" else "no backend 'constant'"):
        open_bundle(tmp_path, backend)
    package = ModuleType("their_package")
    vars(package)["Constant"] = Constant
    monkeypatch.setitem(sys.modules, "their_package", package)
    point = EntryPoint("constant", "their_package:Constant", "erasec.runtimes")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "erasec.runtimes" else [])
    bundle = open_bundle(tmp_path, backend)
    assert (bundle.backend, bundle.root) == ("constant", constant)
    assert bundle.generate(["a star"], [0], STEPS).tolist() == np.zeros((1, 64, 64, 3)).tolist()


def test_the_command_writes_pictures_without_torch(built: Path, expected: Any, tmp_path: Path) -> None:
    words = ["run", str(built), "--prompt", PROMPTS[0], "--out", str(tmp_path / "x.png"), "--steps", str(STEPS)]
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli.app import app\n"
        f"result = CliRunner().invoke(app, {[*words, '--cfg', '5']}); assert result.exit_code == 0, result.output\n"
        "print(result.stdout); print(*sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert output[0] == str(tmp_path / "x.png")
    assert {"erasec.runtime.bundle", "onnxruntime"} <= {*output}
    assert not {"torch", "diffusers", "transformers"} & {*output}
    assert max_difference(np.array(Image.open(tmp_path / "x.png")), expected[0]) <= 2


def test_the_help_names_every_sampler_and_backend() -> None:
    text = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(name in text for name in (*KINDS, *registry.RUNTIMES))


def test_several_pictures_are_numbered_and_count_their_seeds_on(built: Path, tmp_path: Path) -> None:
    words = ["run", built, "--prompt", "a star", "--steps", 2, "--backend", "ort", "--scheduler", "euler"]
    several = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "x.webp"), "--count", "2"])
    assert several.exit_code == 0, several.output
    assert several.stdout.splitlines() == [str(tmp_path / "x-0.webp"), str(tmp_path / "x-1.webp")]
    one = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "y.webp"), "--seed", "1"])
    assert one.exit_code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["x-0.webp", "x-1.webp", "y.webp"]
    assert Image.open(tmp_path / "y.webp").format == "WEBP"
    assert (tmp_path / "y.webp").read_bytes() == (tmp_path / "x-1.webp").read_bytes()
    assert (tmp_path / "y.webp").read_bytes() != (tmp_path / "x-0.webp").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no bundle nowhere"),
        (["empty"], "empty is no bundle"),
        (["built", "--backend", "openvino"], "--target openvino"),
        (["built/onnx", "--backend", "torch"], "it has what ort runs"),
        (["built", "--backend", "orrt"], "did you mean 'ort'?"),
        (["built", "--scheduler", "eular"], "did you mean 'euler'?"),
        (["built", "--height", "72"], "it must be a multiple of 32 fix: --height 64"),
        (["built", "--width", "8"], "fix: --width 32"),
        (["built", "--backend", "torch", "--width", "70"], "it must be a multiple of 8 fix: --width 72"),
        (["built", "--steps", "1000"], "take 1 to 999"),
        (["built", "--out", "x.pgn"], "the suffix '.pgn' is not one that Pillow writes"),
        (["built", "--out", "x"], "the suffix '' is not"),
    ],
)
def test_errors_of_the_command_name_the_cause(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "built").symlink_to(built)
    result = CliRunner().invoke(app, ["run", "--prompt", "a star", "--out", "x.png", *words])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == "" and not list(tmp_path.glob("x*"))


class TestDamage:
    """A copy of the ONNX folder with something wrong in it."""

    @pytest.fixture
    def folder(self, built: Path, tmp_path: Path) -> Path:
        shutil.copytree(built / "onnx", tmp_path / "onnx")
        return tmp_path / "onnx"

    def fails(self, folder: Path) -> str:
        with pytest.raises(ErasecError) as caught:
            open_bundle(folder, threads=1).generate(["a star"], [0], 2)
        return str(caught.value)

    def test_a_config_that_is_damaged(self, folder: Path) -> None:
        (folder / "unet" / "config.json").write_text("{")
        assert "unet/config.json is not JSON" in self.fails(folder)

    def test_a_model_that_paints_into_pictures(self, folder: Path) -> None:
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
        assert "takes 9 channels" in self.fails(folder)

    def test_images_that_are_not_finite(self, folder: Path) -> None:
        config = json.loads((folder / "vae_decoder" / "config.json").read_text())
        (folder / "vae_decoder" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e-37}))
        assert "an image is not finite" in self.fails(folder)


def test_each_prompt_needs_a_seed(built: Path) -> None:
    for prompts, seeds in ((["a", "b"], [1]), ([], [])):
        with pytest.raises(ErasecError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
            open_bundle(built).generate(prompts, seeds)
