"""Target onnx: names and layout, sizes that are truly free, parity with torch, and damage that parity must find."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erasec import extras
from erasec.base import Artifact, Check, Context
from erasec.checkpoint import patch, read_tensor
from erasec.edit import Memory
from erasec.errors import TOOL_MISSING, ErasecError, MissingTool
from erasec.extras import Extras
from erasec.folder import Folder
from erasec.targets import ort
from erasec.targets.ort import Onnx, graphs, pack, parity

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BATCH, SIZE, TOKENS = "batch", ["height", "width"], ["batch", "sequence"]
FLOAT, INT64 = 1, 7
NAMES = {
    "text_encoder": (
        {"input_ids": (INT64, TOKENS)},
        {"last_hidden_state": (FLOAT, [*TOKENS, 128]), "pooler_output": (FLOAT, [BATCH, 128])},
    ),
    "unet": (
        {
            "sample": (FLOAT, [BATCH, 4, *SIZE]),
            "timestep": (FLOAT, []),
            "encoder_hidden_states": (FLOAT, [*TOKENS, 128]),
        },
        {"out_sample": (FLOAT, [BATCH, 4, *SIZE])},
    ),
    "vae_decoder": (
        {"latent_sample": (FLOAT, [BATCH, 4, *SIZE])},
        {"sample": (FLOAT, [BATCH, 3, "height * 8", "width * 8"])},
    ),
    "vae_encoder": (
        {"sample": (FLOAT, [BATCH, 3, *SIZE])},
        {"latent_parameters": (FLOAT, [BATCH, 8, "height // 8", "width // 8"])},
    ),
}


@pytest.fixture(scope="module")
def exported(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Onnx().export(Folder(random_folder), tmp_path_factory.mktemp("exported") / "onnx", Context())


@pytest.fixture
def damaged(exported: Artifact, tmp_path: Path) -> Path:
    """A copy of the export for a test to damage."""
    return Path(shutil.copytree(exported.path, tmp_path / "damaged"))


@pytest.fixture
def base(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "base"))


def session(artifact: Artifact, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(artifact.path / name / "model.onnx", options)


def values(infos: Any) -> dict[str, tuple[int, list[str | int]]]:
    found = {}
    for info in infos:
        kind = info.type.tensor_type
        found[info.name] = (kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim])
    return found


def failed(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let ``parity`` look at one graph."""
    every = ort.graphs
    monkeypatch.setattr(
        ort, "graphs", lambda checkpoint: tuple(each for each in every(checkpoint) if each.name == name)
    )


def test_the_layout_is_the_one_that_pipelines_read(exported: Artifact, random_folder: Path) -> None:
    found = {name.as_posix() for name in Folder(exported.path).files()}
    tokenizer = {f"tokenizer/{path.name}" for path in (random_folder / "tokenizer").iterdir()}
    copied = {"model_index.json", "scheduler/scheduler_config.json"} | tokenizer
    assert found == copied | {f"{name}/{file}" for name in NAMES for file in ("model.onnx", "config.json")}
    assert sorted(path.name for path in exported.path.rglob(".*")) == []
    for name in copied:
        assert (exported.path / name).read_bytes() == (random_folder / name).read_bytes()
    for name, component in (("unet", "unet"), ("vae_encoder", "vae"), ("vae_decoder", "vae")):
        assert json.loads((exported.path / name / "config.json").read_text()) == Folder(random_folder).config(component)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_outputs_have_the_conventional_names(exported: Artifact, name: str) -> None:
    model = onnx.load(exported.path / name / "model.onnx")
    onnx.checker.check_model(model)
    assert (values(model.graph.input), values(model.graph.output)) == NAMES[name]
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18]


def test_parity_passes_on_what_was_exported(exported: Artifact) -> None:
    assert [check.name for check in exported.checks] == [f"parity/{name}" for name in NAMES]
    assert failed(exported.checks) == set()
    assert all(0 < check.value < 2e-5 for check in exported.checks)
    unet = exported.checks[1].how
    assert "9 cases of seed 0" in unet
    assert "sample 2x4x8x8, 1x4x8x12, 3x4x16x8; timestep 1, 500, 981" in unet
    assert "worst: out_sample at sample" in unet


def test_batch_and_size_are_free(exported: Artifact, random_folder: Path) -> None:
    unet = session(exported, "unet")
    rng = np.random.default_rng(0)
    for batch, height, width, tokens in ((5, 4, 28, 77), (1, 24, 4, 3)):
        feed = {
            "sample": rng.standard_normal((batch, 4, height, width), np.float32),
            "timestep": np.array(12.5, np.float32),
            "encoder_hidden_states": rng.standard_normal((batch, tokens, 128), np.float32),
        }
        assert unet.run(None, feed)[0].shape == (batch, 4, height, width)
    latents = rng.standard_normal((3, 4, 5, 9), np.float32)
    images = session(exported, "vae_decoder").run(None, {"latent_sample": latents})[0]
    assert images.shape == (3, 3, 40, 72)
    assert session(exported, "vae_encoder").run(None, {"sample": images})[0].shape == (3, 8, 5, 9)
    states, pooled = session(exported, "text_encoder").run(None, {"input_ids": np.full((5, 9), 831)})
    assert states.shape == (5, 9, 128)
    assert pooled.shape == (5, 128)


def test_fractions_of_a_step_are_not_rounded(exported: Artifact) -> None:
    unet = session(exported, "unet")
    feed = {"sample": np.ones((1, 4, 8, 8), np.float32), "encoder_hidden_states": np.ones((1, 77, 128), np.float32)}
    one, other = (unet.run(None, {**feed, "timestep": np.array(t, np.float32)})[0] for t in (10.0, 10.5))
    assert np.abs(one - other).max() > 1e-6


def test_two_exports_are_the_same_bytes(
    exported: Artifact, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(ort, "parity", lambda *_, **__: ())
    capfd.readouterr()
    Onnx().export(Folder(random_folder), tmp_path / "again", Context(seed=7))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Warning" not in captured.err
    assert Folder(tmp_path / "again").files() == Folder(exported.path).files()
    for name in Folder(exported.path).files():
        assert (tmp_path / "again" / name).read_bytes() == (exported.path / name).read_bytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_machine_is_in_the_file(exported: Artifact, random_folder: Path, name: str) -> None:
    data = (exported.path / name / "model.onnx").read_bytes()
    source = Path(torch.__file__).resolve().parent.parent
    for place in (source, exported.path, random_folder, Path.cwd(), Path.home(), "site-packages", ".py"):
        # The root folder is part of every name; a path says more.
        assert str(place) == "/" or f"{place}".encode() not in data
    model = onnx.load_from_string(data)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def to_k(model: Any) -> Any:
    """The initializer that a cross-attention's to_k multiplies with."""
    node = next(node for node in model.graph.node if "attn2/to_k/MatMul" in node.name)
    return next(tensor for tensor in model.graph.initializer if tensor.name in node.input)


def zeroed(weight: Any) -> Any:
    return np.zeros_like(weight)


def noisy(weight: Any) -> Any:
    return weight + 0.05 * np.random.default_rng(0).standard_normal(weight.shape).astype(np.float32)


def not_finite(weight: Any) -> Any:
    return np.full_like(weight, np.nan)


@pytest.mark.parametrize("damage", [zeroed, noisy, not_finite])
def test_a_damaged_cross_attention_fails(
    damaged: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], Any]
) -> None:
    only(monkeypatch, "unet")
    file = damaged / "unet" / "model.onnx"
    model = onnx.load(file)
    tensor = to_k(model)
    tensor.CopyFrom(onnx.numpy_helper.from_array(damage(onnx.numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, file)
    (check,) = parity(Folder(random_folder), damaged)
    assert not check.passed
    assert check.value == float("inf") if damage is not_finite else ort.TOLERANCE < check.value < float("inf")


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "vae_encoder"])
def test_a_weight_that_is_scaled_fails(
    damaged: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    only(monkeypatch, name)
    file = damaged / name / "model.onnx"
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, file)
    assert failed(parity(Folder(random_folder), damaged)) == {f"parity/{name}"}


def test_a_file_that_cannot_be_loaded_fails_in_words(
    damaged: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "vae_decoder")
    file = damaged / "vae_decoder" / "model.onnx"
    file.write_bytes(file.read_bytes()[:5000])
    for _ in range(2):
        (check,) = parity(Folder(random_folder), damaged)
        assert not check.passed
        assert check.value == float("inf")
        assert "vae_decoder/model.onnx" in check.how
        assert str(damaged) not in check.how
        file.unlink(missing_ok=True)


def test_a_graph_with_a_frozen_size_fails(damaged: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "vae_decoder")
    (graph,) = ort.graphs(Folder(random_folder))
    module = ort._load(Folder(random_folder), graph)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.randn(2, 4, 8, 8),), str(damaged / "vae_decoder" / "model.onnx"), dynamo=False,
            input_names=["latent_sample"], output_names=["sample"],
        )  # fmt: skip
    (check,) = parity(Folder(random_folder), damaged)
    assert not check.passed


def test_a_base_with_a_nan_fails(base: Path, exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "unet")
    key = "conv_out.weight"
    tensor = read_tensor(Folder(base).entries("unet")[key])
    tensor.view(-1)[0] = float("nan")
    (file,) = Folder(base).weight_files("unet")
    patch(file, file, {key: lambda: tensor})
    artifact = Onnx().export(Folder(base), base / "onnx", Context())
    assert [(check.name, check.passed, check.value) for check in artifact.checks] == [
        ("parity/unet", False, float("inf"))
    ]


def test_large_graphs_keep_their_weights_in_one_file_beside_them(exported: Artifact, tmp_path: Path) -> None:
    whole = onnx.load(exported.path / "vae_encoder" / "model.onnx")
    for kind in ("embedded", "loose"):
        scratch, out = tmp_path / kind / "scratch", tmp_path / kind / "out"
        scratch.mkdir(parents=True)
        out.mkdir()
        # As torch writes above 2 GiB: one file a tensor.
        loose = {"save_as_external_data": True, "all_tensors_to_one_file": False} if kind == "loose" else {}
        onnx.save(onnx.load(exported.path / "vae_encoder" / "model.onnx"), scratch / "model.onnx", **loose)
        assert (len(list(scratch.iterdir())) > 10) is (kind == "loose")
        pack(scratch, out, embedded=1_000_000)
        assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.onnx_data"]
        assert (out / "model.onnx").stat().st_size < 200_000
        packed = onnx.load(out / "model.onnx")
        for ours, theirs in zip(packed.graph.initializer, whole.graph.initializer, strict=True):
            assert np.array_equal(onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(theirs))
        feed = {"sample": np.ones((1, 3, 16, 16), np.float32)}
        moved = onnxruntime.InferenceSession(out / "model.onnx").run(None, feed)[0]
        assert np.array_equal(moved, session(exported, "vae_encoder").run(None, feed)[0])


def test_a_config_without_a_scaling_factor_gets_the_one_that_torch_uses(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "vae_decoder")
    config = Folder(base).config("vae")
    del config["scaling_factor"]
    (base / "vae" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(ort, "parity", lambda *_, **__: ())
    Onnx().export(Folder(base), tmp_path / "onnx", Context())
    factor = ort._load(Folder(base), ort.graphs(Folder(base))[0]).config.scaling_factor
    assert Folder(tmp_path / "onnx").config("vae_decoder") == config | {"scaling_factor": factor}


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet3D"]}, "onnx: unet is a UNet3D"),
        ("model_index.json", {"vae": [None, None]}, "onnx: vae is missing"),
        ("model_index.json", {"text_encoder_2": ["transformers", "T"]}, "onnx: the model has a text_encoder_2"),
        ("unet/config.json", {"class_embed_type": "time"}, "onnx: the unet has class_embed_type = 'time'"),
    ],
)
def test_other_models_are_refused_in_words(base: Path, file: str, changes: dict[str, Any], words: str) -> None:
    rewrite(base / file, **changes)
    with pytest.raises(ErasecError) as caught:
        Onnx().export(Folder(base), base / "onnx", Context())
    assert caught.value.what == words
    assert caught.value.why
    assert not (base / "onnx").exists()


def test_a_tensor_that_is_not_there_is_not_made_up(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"conv_out.bias"', b'"conv_oup.bias"', 1))
    with pytest.raises(ErasecError, match=r"unet has no conv_out\.bias"):
        ort._load(Folder(base), graphs(Folder(base))[1])


@pytest.mark.parametrize(("options", "words"), [({"opset": 11}, "opset 11"), ({"tolerance": 0.0}, "tolerance is 0.0")])
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError, match=words):
        Onnx(**options)


def test_a_missing_tool_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    Onnx().check()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingTool) as caught:
        Onnx().check()
    assert caught.value.exit_code == TOOL_MISSING
    assert caught.value.what == "the target onnx needs onnxruntime"
    assert caught.value.fix == 'pip install "erasec[onnx]"'


def test_importing_the_targets_imports_no_torch() -> None:
    code = "import sys, erasec.targets.ort, erasec.targets.hf; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


JOINT = "mid_block.attentions.0.transformer_blocks.0.attn2"
SIDE = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def carrying(base: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Extras]:
    """A checkpoint with a joint and a side memory, and what it holds; of its graphs, the UNet's alone is looked at."""
    only(monkeypatch, "unet")
    joint = Memory(JOINT, 3 * draw(0, 5, 192), 3 * draw(1, 5, 192))
    side = Memory(SIDE, 3 * draw(2, 4, 64), 3 * draw(3, 4, 64), "side", -2.0, 0.7, True)
    extras.write(base, Extras((joint, side)))
    return base, Extras((joint, side))


def test_memories_are_constants_of_the_graph(
    carrying: tuple[Path, Extras], random_folder: Path, tmp_path: Path
) -> None:
    base, held = carrying
    artifact = Onnx().export(Folder(base), tmp_path / "out", Context())
    assert [(check.name, check.passed) for check in artifact.checks] == [("parity/unet", True)]
    assert 0 < artifact.checks[0].value < 2e-5
    # Parity would see it if they were not there, in the graph or in torch.
    (without,) = parity(Folder(random_folder), tmp_path / "out")
    assert not without.passed
    assert without.value > 100 * ort.TOLERANCE
    model = onnx.load(tmp_path / "out" / "unet" / "model.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "Constant"]
    found = [*model.graph.initializer, *(attribute.t for node in nodes for attribute in node.attribute)]
    stored = {onnx.numpy_helper.to_array(tensor).tobytes() for tensor in found}
    for memory in held.memories:
        assert memory.keys.numpy().tobytes() in stored
        assert memory.values.numpy().tobytes() in stored
    assert values(model.graph.input) == NAMES["unet"][0]

    # The gates are in the graph: by step on both sides of the edge, by row in batches that are free.
    (graph,) = ort.graphs(Folder(base))
    stock, attached, unet = (
        ort._load(Folder(random_folder), graph),
        ort._load(Folder(base), graph),
        session(artifact, "unet"),
    )
    extras.write(base, Extras(held.memories[:1]))
    joint_alone = ort._load(Folder(base), graph)
    for step, batch, rows in ((299, 4, []), (300, 4, [2, 3]), (999, 2, [1]), (301, 3, [0, 1, 2]), (500, 1, [0])):
        inputs = draw(4, batch, 4, 8, 8), torch.tensor(float(step)), draw(5, batch, 77, 128)
        names = ("sample", "timestep", "encoder_hidden_states")
        answer = unet.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
        with torch.no_grad():
            plain, wanted, joint = (module(*inputs).numpy() for module in (stock, attached, joint_alone))
        assert np.abs(answer - wanted).max() < 1e-5
        assert np.abs(answer - plain).max(axis=(1, 2, 3)).min() > 1e-3
        moved = np.abs(answer - joint).max(axis=(1, 2, 3))
        assert [row for row in range(batch) if moved[row] > 1e-3] == rows
        assert all(moved[row] < 1e-5 for row in range(batch) if row not in rows)


def test_a_schedule_of_another_length_moves_the_gate(carrying: tuple[Path, Extras]) -> None:
    base, _ = carrying
    (graph,) = ort.graphs(Folder(base))
    file = base / "scheduler" / "scheduler_config.json"
    found = []
    for steps in (1000, 100):
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": steps}))
        found.append(ort._load(Folder(base), graph).get_submodule(SIDE).processor.side[0].start)
    assert found == [300, 30]


def test_tokens_and_a_negative_prompt_are_refused(carrying: tuple[Path, Extras], tmp_path: Path) -> None:
    base, held = carrying
    extras.write(base, Extras(held.memories, {"<a>": draw(0, 128)}, "a star"))
    with pytest.raises(ErasecError, match="onnx cannot hold all") as caught:
        Onnx().export(Folder(base), tmp_path / "out", Context())
    assert "new tokens <a>; the negative prompt 'a star'" in caught.value.why
    assert "memories" not in caught.value.why
    assert not (tmp_path / "out").exists()
