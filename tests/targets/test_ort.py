"""Target onnx: names and layout, dynamic sizes, what is part of the graphs, and checks that can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erasec.base import Artifact, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import patch_file, read_tensor
from erasec.commands.relink import relink
from erasec.errors import TOOL_MISSING, ErasecError, MissingTool
from erasec.graphs.link import BASE, EDITED, write_onnx
from erasec.graphs.manifest import MANIFEST, LinkContext
from erasec.graphs.parity import TOLERANCES, compare_outputs, compare_weights, load_module
from erasec.graphs.signature import graphs
from erasec.model import loading
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, write_extras
from erasec.targets import ort
from erasec.targets.ort import Onnx

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
    return Onnx().export(Folder(random_folder), tmp_path_factory.mktemp("exported"), Context())


@pytest.fixture
def base(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "base"))


def session(artifact: Artifact, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(artifact.path / name / "model.onnx", options)


def values(infos: Any) -> dict[str, tuple[int, list[str | int]]]:
    by_name = {}
    for info in infos:
        kind = info.type.tensor_type
        by_name[info.name] = (kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim])
    return by_name


def test_the_layout_is_the_one_that_pipelines_read(exported: Artifact, random_folder: Path) -> None:
    written = {name.as_posix() for name in Folder(exported.path).files()}
    tokenizer = {f"tokenizer/{path.name}" for path in (random_folder / "tokenizer").iterdir()}
    copied = {"model_index.json", "scheduler/scheduler_config.json"} | tokenizer
    files = ("model.onnx", BASE, "config.json")
    assert written == copied | {MANIFEST} | {f"{name}/{file}" for name in NAMES for file in files}
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


def test_weights_and_parity_are_checked(exported: Artifact) -> None:
    kinds = ("weights", "parity")
    assert [check.name for check in exported.checks] == [f"{kind}/{name}" for kind in kinds for name in NAMES]
    assert all(check.passed for check in exported.checks)
    assert [check.value for check in exported.checks[:4]] == [0.0] * 4
    assert all(0 < check.value < 2e-5 for check in exported.checks[4:])


def test_batch_and_size_are_dynamic(exported: Artifact, random_folder: Path) -> None:
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


def test_fractional_timesteps_are_not_rounded(exported: Artifact) -> None:
    unet = session(exported, "unet")
    feed = {"sample": np.ones((1, 4, 8, 8), np.float32), "encoder_hidden_states": np.ones((1, 77, 128), np.float32)}
    whole, fraction = (unet.run(None, {**feed, "timestep": np.array(t, np.float32)})[0] for t in (10.0, 10.5))
    assert np.abs(whole - fraction).max() > 1e-6


def test_two_exports_are_the_same_bytes(
    exported: Artifact, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(ort, "compare_outputs", lambda *_, **__: ())
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


def test_a_base_with_a_nan_fails(base: Path, tmp_path: Path) -> None:
    key = "encoder.conv_out.weight"
    tensor = read_tensor(Folder(base).entries("vae")[key])
    tensor.view(-1)[0] = float("nan")
    (file,) = Folder(base).weight_files("vae")
    patch_file(file, file, {key: lambda: tensor})
    write_onnx(Folder(base), tmp_path / "onnx", names=("vae_encoder",))
    (check,) = compare_outputs(Folder(base), tmp_path / "onnx")
    assert (check.passed, check.value) == (False, float("inf"))


def test_a_config_without_a_scaling_factor_gets_the_one_that_torch_uses(base: Path, tmp_path: Path) -> None:
    config = Folder(base).config("vae")
    del config["scaling_factor"]
    (base / "vae" / "config.json").write_text(json.dumps(config))
    write_onnx(Folder(base), tmp_path / "onnx", names=("vae_decoder",))
    decoder = next(graph for graph in graphs(Folder(base)) if graph.name == "vae_decoder")
    factor = load_module(Folder(base), decoder).config.scaling_factor
    assert Folder(tmp_path / "onnx").config("vae_decoder") == config | {"scaling_factor": factor}


def test_other_models_are_refused_before_anything_is_written(base: Path) -> None:
    index = base / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder_2": ["transformers", "T"]}))
    with pytest.raises(ErasecError, match="onnx: the model has the component text_encoder_2"):
        Onnx().export(Folder(base), base / "onnx", Context())
    assert not (base / "onnx").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 11}, "option opset is 11"),
        ({"opset": 21}, "option opset is 21"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"precision": "fp61"}, "option precision is 'fp61'"),
        ({"vae": "int8"}, "option vae is 'int8'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError, match=words):
        Onnx(**options)


def test_the_error_for_a_missing_tool_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
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


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checks out, for tests of what they do not look at."""
    for name in ("compare_outputs", "compare_weights"):
        monkeypatch.setattr(ort, name, lambda *_, **__: ())


def test_options_reach_the_graphs(random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(ort, "write_onnx", lambda *args, **options: seen.update(options, precision=args[2]))
    monkeypatch.setattr(ort, "read_manifest", lambda _: {"precision": "fp16", "vae": "fp16"})
    quiet(monkeypatch)
    monkeypatch.setattr(ort, "compare_outputs", lambda *_, **options: seen.update(options) or ())
    options = {"precision": "fp16", "vae": "fp16", "keep_in_fp32": "*norm*+conv_in", "opset": 19, "base": "other"}
    Onnx(**options, tolerance=0.5).export(Folder(random_folder), tmp_path, Context(seed=3))
    assert seen == {
        "precision": "fp16",
        "vae": "fp16",
        "keep_in_fp32": ("*norm*", "conv_in"),
        "opset": 19,
        "origin": None,
        "share": Path("other"),
        "seed": 3,
        "tolerances": {"fp32": 0.5, "fp16": 0.5},
    }
    Onnx(keep_in_fp32="").export(Folder(random_folder), tmp_path, Context())
    assert (seen["keep_in_fp32"], seen["share"], seen["tolerances"]) == ((), None, TOLERANCES)


def test_variants_share_their_base(
    variant: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(monkeypatch)
    a, b = variant("a"), variant("b")
    Onnx(base=str(a.onnx)).export(Folder(b.folder), tmp_path / "onnx", LinkContext(origin=b.origin))
    for name in NAMES:
        assert (tmp_path / "onnx" / name / BASE).samefile(a.onnx / name / BASE)
    assert (tmp_path / "onnx" / "unet" / EDITED).read_bytes() == (b.onnx / "unet" / EDITED).read_bytes()


def test_check_refuses_a_folder_that_cannot_be_shared(variant: Callable[[str], Any], tmp_path: Path) -> None:
    Onnx(base=str(variant("a").onnx)).check()
    with pytest.raises(ErasecError, match="is no ONNX folder of erasec"):
        Onnx(base=str(tmp_path)).check()
    with pytest.raises(ErasecError, match="cannot be shared") as caught:
        Onnx(base=str(variant("a").onnx), precision="fp16").check()
    assert caught.value.why == "its precision is fp32, vae=fp32"


@pytest.mark.parametrize(("precision", "vae"), [("fp32", "fp32"), ("fp16", "fp32"), ("fp16", "fp16")])
def test_the_estimated_size_is_the_size_of_the_weights(
    random_folder: Path, tmp_path: Path, precision: str, vae: str
) -> None:
    write_onnx(Folder(random_folder), tmp_path / "onnx", precision, vae=vae)
    real = sum(file.stat().st_size for file in (tmp_path / "onnx").rglob("model.onnx_data"))
    assert 0.9 < Onnx(precision=precision, vae=vae).size(loading.load(str(random_folder))) / real < 1.02


def test_a_model_without_such_graphs_is_refused_by_the_size(base: Path) -> None:
    """A plan asks for the size, so nothing is solved and written first."""
    config = base / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "class_embed_type": "time"}))
    with pytest.raises(ErasecError, match="the unet has class_embed_type"):
        Onnx().size(loading.load(str(base)))


JOINT = "mid_block.attentions.0.transformer_blocks.0.attn2"
SIDE = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def carrying(base: Path) -> tuple[Path, Extras]:
    """A checkpoint with a joint and a side memory, and what it holds."""
    joint = Memory(JOINT, 3 * draw(0, 5, 192), 3 * draw(1, 5, 192))
    side = Memory(SIDE, 3 * draw(2, 4, 64), 3 * draw(3, 4, 64), "side", -2.0, 0.7, True)
    write_extras(base, Extras((joint, side)))
    return base, Extras((joint, side))


def test_memories_are_constants_of_the_graph(
    carrying: tuple[Path, Extras], random_folder: Path, variant: Callable[[str], Any], tmp_path: Path
) -> None:
    base, held = carrying
    out = tmp_path / "out"
    write_onnx(Folder(base), out, names=("unet",))
    (same,), (check,) = compare_weights(Folder(base), out), compare_outputs(Folder(base), out)
    assert (same.passed, check.passed) == (True, True)
    assert 0 < check.value < 2e-5
    # Both would see it if they were not there.
    (without,) = compare_outputs(Folder(random_folder), out)
    assert not without.passed
    assert without.value > 100 * TOLERANCES["fp32"]
    model = onnx.load(out / "unet" / "model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    memories = {array.tobytes() for name, array in stored.items() if name.startswith("erasec_memory")}
    assert memories == {rows.numpy().tobytes() for each in held.memories for rows in (each.keys, each.values)}
    assert values(model.graph.input) == NAMES["unet"][0]
    with pytest.raises(ErasecError, match="is more than weights"):
        relink(out, variant("a").edit)

    # The gates are in the graph: by step on both sides of the edge, by row in batches that are free.
    graph = next(each for each in graphs(Folder(base)) if each.name == "unet")
    stock, attached = load_module(Folder(random_folder), graph), load_module(Folder(base), graph)
    unet = session(Artifact("onnx", out), "unet")
    write_extras(base, Extras(held.memories[:1]))
    joint_alone = load_module(Folder(base), graph)
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


def test_another_memory_of_the_same_shape_fails(carrying: tuple[Path, Extras], tmp_path: Path) -> None:
    base, held = carrying
    write_onnx(Folder(base), tmp_path / "out", names=("unet",))
    joint, side = held.memories
    write_extras(base, Extras((Memory(JOINT, joint.keys, -joint.values), side)))
    (check,) = compare_weights(Folder(base), tmp_path / "out")
    assert (check.value, check.passed) == (1.0, False)
    assert "erasec_memory_0_values" in check.how


def test_memories_in_fp16(carrying: tuple[Path, Extras], random_folder: Path, tmp_path: Path) -> None:
    base, _ = carrying
    write_onnx(Folder(base), tmp_path / "out", "fp16", ("unet",))
    (check,) = compare_outputs(Folder(base), tmp_path / "out")
    assert check.passed
    (same,) = compare_weights(Folder(base), tmp_path / "out")
    assert same.passed
    model = onnx.load(tmp_path / "out" / "unet" / "model.onnx", load_external_data=False)
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.name.startswith("erasec_memory")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    (without,) = compare_outputs(Folder(random_folder), tmp_path / "out")
    assert not without.passed


def test_tokens_and_the_negative_prompt_are_in_the_text_encoder(
    base: Path, random_folder: Path, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    row, out = draw(0, 128), tmp_path / "out"
    write_extras(base, Extras((), {"<a>": row}, "a star"))
    write_onnx(Folder(base), out, names=("text_encoder",))
    (same,), (check,) = compare_weights(Folder(base), out), compare_outputs(Folder(base), out)
    assert (same.passed, check.passed) == (True, True)
    (without,) = compare_outputs(Folder(random_folder), out)
    assert not without.passed

    tokenizer, stock = (CLIPTokenizer.from_pretrained(root / "tokenizer") for root in (out, random_folder))
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "np"}
    prompts = ["", "a star", "a circle", "a <a> circle"]
    ids, before = (each(prompts, **options).input_ids for each in (tokenizer, stock))
    assert np.array_equal(ids[:3], before[:3])
    vocabulary = Folder(base).config("text_encoder")["vocab_size"]
    assert ids[3].max() == vocabulary
    encode = session(Artifact("onnx", out), "text_encoder").run
    states = encode(["last_hidden_state"], {"input_ids": ids})[0]
    encoder = next(each for each in graphs(Folder(base)) if each.name == "text_encoder")
    with torch.no_grad():
        plain = load_module(Folder(random_folder), encoder)(torch.from_numpy(ids[:3]))[0].numpy()
    assert np.abs(states[0] - plain[1]).max() < 1e-5  # the empty prompt is encoded as the negative one
    assert np.abs(plain[0] - plain[1]).max() > 1e-2
    assert np.abs(states[1:3] - plain[1:]).max() < 1e-5  # and all others as themselves
    table = onnx.load(out / "text_encoder" / "model.onnx").graph.initializer
    stored = next(onnx.numpy_helper.to_array(each) for each in table if each.name.endswith("token_embedding.weight"))
    assert np.array_equal(stored[vocabulary:], row.numpy()[None])
