"""What was built makes the pictures that the report saw, whatever runs it: here against torch's pipeline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from erasec.attention.processors import pipeline
from erasec.checkpoint.folder import CARRIED, Folder
from erasec.cli import app as cli
from erasec.errors import ErasecError, MissingTool
from erasec.graphs import link as linker
from erasec.judging.judge import Sampling, generate
from erasec.model import sidecar as extras
from erasec.model import view as models
from erasec.model.edit import Memory
from erasec.model.sidecar import Extras
from erasec.runtime import backends
from erasec.runtime import bundle as runner
from erasec.runtime.schedulers import KINDS
from erasec.tensorrt import engines

NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
PROMPTS, SEEDS = ("a red star", "", "a blue circle", "two green rings"), (0, 3, 2**31 + 5, 2**32 + 1)
STEPS = 4
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a build of glyphs writes: onnx, openvino where it is installed, and hf, which is the checkpoint."""
    out = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ERASEC_CACHE", str(out / "cache"))
        (out / "hf").symlink_to(models.bundled("glyphs"))
        linker.write(Folder(out / "hf"), out / "onnx")
        yield out


@pytest.fixture(scope="module")
def carrying(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glyphs with a memory for prompted rows alone and a negative prompt, as bundle and as onnx."""
    out, draw = tmp_path_factory.mktemp("carrying"), torch.Generator().manual_seed(0)
    shutil.copytree(built / "hf", out / "bundle")
    width = Folder(out / "bundle").entries("unet")[f"{ATTENTION}.to_k.weight"].shape[0]
    keys, values = torch.randn(2, 3, width, generator=draw)
    memory = Memory(ATTENTION, keys, 20 * values, mode="side", weight=0.8, until=0.7, guided=True)
    extras.write(out / "bundle", Extras((memory,), {}, "a yellow square"))
    linker.write(Folder(out / "bundle"), out / "onnx", names=NAMES[:3])
    return out


def apart(one: Any, other: Any) -> int:
    """The largest difference of a level, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture(scope="module")
def opened(built: Path) -> runner.Bundle:
    return runner.open_bundle(built, "ort", threads=1)


@pytest.fixture(scope="module")
def wanted(built: Path) -> Any:
    return generate(built / "hf", PROMPTS, SEEDS, Sampling(STEPS, 5.0), "")


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_pictures_are_those_of_the_pipeline_and_of_their_seeds(built: Path, wanted: Any, backend: str) -> None:
    bundle = runner.open_bundle(built, backend, threads=1)
    assert bundle.backend == backend
    found = bundle.generate(PROMPTS, SEEDS, STEPS, 5.0)
    assert found.shape == (4, 64, 64, 3) and found.dtype == np.uint8
    assert apart(found, wanted) <= 2
    assert apart(bundle.generate(PROMPTS[:3], SEEDS[:3], STEPS, 5.0, batch=2), wanted[:3]) <= 2
    assert apart(bundle.generate(PROMPTS[:1], (1,), STEPS, 5.0), wanted[:1]) > 50
    assert apart(bundle.generate(PROMPTS[:1], SEEDS[:1], STEPS, 3.0), wanted[:1]) > 2
    bundle.drop("unet")
    assert apart(bundle.generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0), wanted[:1]) <= 2
    bundle.close()


def test_openvino_makes_them_too(built: Path, wanted: Any, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    for name in NAMES[:3]:
        made = openvino.convert_model(built / "onnx" / name / "model.onnx")
        openvino.save_model(made, tmp_path / "openvino" / name / "openvino_model.xml", compress_to_fp16=False)
        shutil.copy(built / "onnx" / name / "config.json", tmp_path / "openvino" / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(built / "onnx" / name, tmp_path / "openvino" / name)
    bundle = runner.open_bundle(tmp_path, threads=1)
    assert bundle.backend == "openvino"
    assert apart(bundle.generate(PROMPTS, SEEDS, STEPS, 5.0), wanted) <= 2
    assert apart(bundle.generate(PROMPTS[:1], (1,), STEPS, 5.0), wanted[:1]) > 50


def test_another_scheduler_is_that_of_diffusers(built: Path, opened: runner.Bundle) -> None:
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
            [PROMPTS[0]], num_inference_steps=STEPS, guidance_scale=5.0, height=64, width=96, output_type="np",
            generator=[torch.Generator().manual_seed(SEEDS[0])],
        ).images  # fmt: skip
        pictures[kind] = opened.generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, height=64, width=96, scheduler=kind)
        assert pictures[kind].shape == (1, 64, 96, 3)
        assert apart(pictures[kind], np.rint(theirs * 255)) <= 2
    stock = opened.generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, height=64, width=96)
    assert all(apart(picture, stock) > 2 for picture in pictures.values())


def test_memories_and_the_negative_prompt_act_as_in_the_pipeline(carrying: Path, opened: runner.Bundle) -> None:
    bundles = [runner.open_bundle(carrying, backend, threads=1) for backend in ("ort", "torch")]
    assert [bundle.root for bundle in bundles] == [carrying / "onnx", carrying / "bundle"]
    for guidance in (5.0, 1.0):
        asked: Any = PROMPTS[::2], SEEDS[::2], STEPS, guidance
        theirs = generate(carrying / "bundle", *asked[:2], Sampling(STEPS, guidance), "")
        for bundle in bundles:
            assert apart(bundle.generate(*asked), theirs) <= 2
        for one, other in zip(opened.generate(*asked), theirs, strict=True):
            assert apart(one, other) > 10
    own = bundles[1].generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0)
    assert apart(bundles[1].generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, negative="a yellow square"), own) == 0
    assert apart(bundles[1].generate(PROMPTS[:1], SEEDS[:1], STEPS, 5.0, negative=""), own) > 2


def test_a_component_takes_and_gives_the_same_whatever_runs_it(built: Path, opened: runner.Bundle) -> None:
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    asked = {"text_encoder": {"input_ids": opened.parts.ids(PROMPTS)}, "vae_encoder": {"sample": pixels}}
    other = runner.open_bundle(built, "torch", threads=1)
    for component, inputs in asked.items():
        ours, theirs = opened.run(component, inputs), other.run(component, inputs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert np.abs(ours[name] - theirs[name]).max() < 1e-4 * np.abs(theirs[name]).max()


class Session:
    """An engine's session on a machine that has no GPU: the graph that it would be built from."""

    closed = 0

    def __init__(self, file: Path) -> None:
        self.inside = backends.onnx_runtime(file.with_name("model.onnx"), 1)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert all(len(value) <= 2 for value in inputs.values() if value.ndim)
        return self.inside.run(inputs)

    def close(self) -> None:
        Session.closed += 1


@pytest.mark.parametrize(("library", "backend"), [(engines.RTX, "trt-rtx"), (engines.TRT, "trt")])
def test_engines_are_run_through_their_session_and_within_their_profile(
    built: Path, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, backend: str
) -> None:
    shutil.copytree(built / "onnx", tmp_path / "built" / backend)
    profile = {"input": {"min": [1, 4], "opt": [1, 4], "max": [2, 4]}, "timestep": {"min": [], "opt": [], "max": []}}
    told = {"file": "", "engine": "", "graph": "", "weights": "", "profile": profile}
    record = {"schema": engines.SCHEMA, "builder": {"name": library, "version": "1"}, "capabilities": [],
              "components": dict.fromkeys(NAMES, told)}  # fmt: skip
    (tmp_path / "built" / backend / engines.RECORD).write_text(json.dumps(record))
    for name in NAMES:
        (tmp_path / "built" / backend / name / "model.engine").touch()
    monkeypatch.setattr(engines, "Session", Session)
    bundle = runner.open_bundle(tmp_path / "built", backend)
    assert (bundle.backend, bundle.parts.batch) == (backend, 1)
    before = Session.closed
    assert apart(bundle.generate(PROMPTS[:2], SEEDS[:2], STEPS, 5.0), wanted[:2]) <= 2
    bundle.close()
    assert Session.closed == before + 3
    other = {"trt": "trt-rtx", "trt-rtx": "trt"}[backend]
    with pytest.raises(ErasecError, match=f"nothing for the backend {other}"):
        runner.open_bundle(tmp_path / "built" / backend, other)


def test_engines_without_a_record_are_in_nobody_elses_way(built: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").symlink_to(built / "onnx")
    (tmp_path / "trt-rtx" / "unet").mkdir(parents=True)
    (tmp_path / "trt-rtx" / "unet" / "model.engine").touch()
    for backend in ("auto", "ort"):
        assert runner.open_bundle(tmp_path, backend).root == tmp_path / "onnx"
    with pytest.raises(ErasecError, match="no folder of engines"):
        runner.open_bundle(tmp_path, "trt-rtx")


def test_the_command_writes_pictures_without_torch(built: Path, wanted: Any, tmp_path: Path) -> None:
    words = ["run", str(built), "--prompt", PROMPTS[0], "--out", str(tmp_path / "x.png"), "--steps", str(STEPS)]
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli import app as cli\n"
        f"found = CliRunner().invoke(cli.app, {[*words, '--cfg', '5']}); assert found.exit_code == 0, found.output\n"
        "print(found.stdout); print(*sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told[0] == str(tmp_path / "x.png")
    assert {"erasec.runtime.bundle", "onnxruntime"} <= {*told}
    assert not {"torch", "diffusers", "transformers"} & {*told}
    assert apart(np.array(Image.open(tmp_path / "x.png")), wanted[0]) <= 2


def test_the_help_names_every_sampler_and_backend() -> None:
    told = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(name in told for name in (*KINDS, *runner.TARGETS))


def test_several_pictures_are_numbered_and_count_their_seeds_on(built: Path, tmp_path: Path) -> None:
    words = ["run", built, "--prompt", "a star", "--steps", 2, "--backend", "ort", "--scheduler", "euler"]
    several = CliRunner().invoke(cli.app, [*map(str, words), "-o", str(tmp_path / "x.webp"), "--count", "2"])
    assert several.exit_code == 0, several.output
    assert several.stdout.splitlines() == [str(tmp_path / "x-0.webp"), str(tmp_path / "x-1.webp")]
    one = CliRunner().invoke(cli.app, [*map(str, words), "-o", str(tmp_path / "y.webp"), "--seed", "1"])
    assert one.exit_code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["x-0.webp", "x-1.webp", "y.webp"]
    assert Image.open(tmp_path / "y.webp").format == "WEBP"
    assert (tmp_path / "y.webp").read_bytes() == (tmp_path / "x-1.webp").read_bytes()
    assert (tmp_path / "y.webp").read_bytes() != (tmp_path / "x-0.webp").read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
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
def test_what_cannot_be_run_is_told(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "built").symlink_to(built)
    found = CliRunner().invoke(cli.app, ["run", "--prompt", "a star", "--out", "x.png", *words])
    assert found.exit_code == 2, found.output
    assert told in " ".join(found.stderr.split())
    assert found.stdout == "" and not list(tmp_path.glob("x*"))


class TestDamage:
    """A copy of the ONNX folder with something wrong in it."""

    @pytest.fixture
    def folder(self, built: Path, tmp_path: Path) -> Path:
        shutil.copytree(built / "onnx", tmp_path / "onnx")
        return tmp_path / "onnx"

    def fails(self, folder: Path) -> str:
        with pytest.raises(ErasecError) as told:
            runner.open_bundle(folder, threads=1).generate(["a star"], [0], 2)
        return str(told.value)

    def test_a_graph_that_is_damaged_or_missing(self, folder: Path) -> None:
        graph = folder / "text_encoder" / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:1000])
        assert "text_encoder/model.onnx cannot be loaded" in self.fails(folder)
        graph.unlink()
        assert "the bundle has no text_encoder/model.onnx" in self.fails(folder)

    def test_a_config_that_is_damaged(self, folder: Path) -> None:
        (folder / "unet" / "config.json").write_text("{")
        assert "no unet/config.json that can be read" in self.fails(folder)

    def test_a_model_that_paints_into_pictures(self, folder: Path) -> None:
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
        assert "takes 9 channels" in self.fails(folder)

    def test_tokens_that_the_tokenizer_does_not_know(self, folder: Path) -> None:
        row = torch.zeros(128)
        extras.write(folder, Extras((), {"<new>": row}))
        assert "does not know the new token '<new>'" in self.fails(folder)
        extras.write(folder, Extras((), {"star</w>": row}))
        assert runner.open_bundle(folder).parts.ids(["a star"]).shape == (1, 77)

    def test_extras_that_are_damaged(self, folder: Path) -> None:
        extras.write(folder, Extras((), {}, "blood"))
        assert backends.carried(folder) == ("blood", [])
        path = folder / CARRIED
        path.write_bytes(path.read_bytes().replace(b"erasec.extras", b"erasec.extraz"))
        assert f"{CARRIED} is damaged" in self.fails(folder)

    def test_pictures_that_are_not_finite(self, folder: Path) -> None:
        config = json.loads((folder / "vae_decoder" / "config.json").read_text())
        (folder / "vae_decoder" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e-37}))
        assert "a picture is not finite" in self.fails(folder)

    @pytest.mark.parametrize(("backend", "library", "extra"), [("ort", "onnxruntime", "onnx"), ("openvino",) * 3])
    def test_a_library_that_is_missing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str, library: str, extra: str
    ) -> None:
        for graph in folder.glob("*/model.onnx"):
            graph.with_name("openvino_model.xml").touch()
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingTool) as told:
            runner.open_bundle(folder, backend).generate(["a star"], [0], 2)
        assert library in told.value.what and told.value.fix == f'pip install "erasec[{extra}]"'


def test_each_prompt_needs_a_seed(built: Path) -> None:
    for prompts, seeds in ((["a", "b"], [1]), ([], [])):
        with pytest.raises(ErasecError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
            runner.open_bundle(built).generate(prompts, seeds)
