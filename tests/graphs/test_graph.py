"""Graphs as data: which a checkpoint has, and a cache that never gives half of one."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.graphs import graph as graphs
from erasec.graphs.graph import Template, Weight, keep, weight_from, whole

onnx = pytest.importorskip("onnx")
WEIGHT = Weight("a:transpose", "a", (2, 3), (1, 0), (3, 2), "float32")


def model(name: str = "graph") -> Any:
    return onnx.helper.make_model(onnx.helper.make_graph([], name, [], []))


@pytest.fixture
def base(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "base"))


def test_a_checkpoint_has_four_graphs_with_free_batch_and_size(random_folder: Path) -> None:
    found = {graph.name: graph for graph in graphs.graphs(Folder(random_folder))}
    assert {name: graph.component for name, graph in found.items()} == {
        "text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae",
    }  # fmt: skip
    assert list(found["unet"].inputs) == ["sample", "timestep", "encoder_hidden_states"]
    assert found["vae_decoder"].outputs == {"sample": {0: "batch", 2: "height * 8", 3: "width * 8"}}


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet3D"]}, "onnx: unet is a UNet3D"),
        ("model_index.json", {"vae": [None, None]}, "onnx: vae is missing"),
        ("model_index.json", {"text_encoder_2": ["transformers", "T"]}, "onnx: the model has a text_encoder_2"),
        ("unet/config.json", {"class_embed_type": "time"}, "onnx: the unet has class_embed_type = 'time'"),
        ("unet/config.json", {"num_class_embeds": 7}, "onnx: the unet has num_class_embeds = 7"),
    ],
)
def test_other_models_are_refused_in_words(base: Path, file: str, changes: dict[str, Any], words: str) -> None:
    rewrite(base / file, **changes)
    with pytest.raises(ErasecError) as caught:
        graphs.graphs(Folder(base))
    assert caught.value.what == words
    assert caught.value.why


def test_what_a_configuration_says_of_itself_is_not_computed() -> None:
    told = {"_name_or_path": "/somebody", "_class_name": "UNet", "architectures": [], "dtype": "float16", "layers": 2}
    assert graphs.computed(told) == {"layers": 2}


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "own"))
    assert graphs.cache() == tmp_path / "own"
    monkeypatch.delenv("ERASEC_CACHE")
    assert graphs.cache() == tmp_path / "xdg" / "erasec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert graphs.cache() == Path.home() / ".cache" / "erasec"


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    keep(tmp_path / "kept", model(), [WEIGHT])
    assert whole(tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o755  # for all who share the cache
    template = Template(tmp_path / "kept", "key")
    assert template.weights == (WEIGHT,)
    assert template.load() == model()
    assert weight_from(json.loads((tmp_path / "kept" / "weights.json").read_text())[0]) == WEIGHT


@pytest.mark.parametrize("name", ["model.onnx", "weights.json", "digest"])
def test_a_damaged_graph_is_not_whole_and_is_replaced(tmp_path: Path, name: str) -> None:
    root = tmp_path / "kept"
    keep(root, model(), [WEIGHT])
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not whole(root)
    keep(root, model(), [WEIGHT])
    assert whole(root)
    (root / name).unlink()
    assert not whole(root)


def test_of_two_the_first_stays_so_that_who_reads_it_can_go_on(tmp_path: Path) -> None:
    root = tmp_path / "kept"
    keep(root, model("first"), [WEIGHT])
    keep(root, model("second"), [])
    assert Template(root, "").load().graph.name == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_many_at_once_leave_one_whole_graph(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            list(pool.map(lambda _, number=number: keep(tmp_path / f"{number}", model(), [WEIGHT]), range(8)))
            assert whole(tmp_path / f"{number}")
    assert len(list(tmp_path.iterdir())) == 10


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(graphs.os, "replace", full)
    with pytest.raises(OSError, match="full"):
        keep(tmp_path / "kept", model(), [WEIGHT])
    assert not list(tmp_path.iterdir())


def test_whole_prompts_fix_one_axis_alone(random_folder: Path) -> None:
    text = graphs.graphs(Folder(random_folder))[0]
    whole_text = graphs.with_whole_prompts(text)
    assert whole_text.inputs == {"input_ids": {0: "batch"}}
    assert whole_text.outputs == {"last_hidden_state": {0: "batch"}, "pooler_output": {0: "batch"}}
    assert text.inputs == {"input_ids": {0: "batch", 1: "sequence"}}
