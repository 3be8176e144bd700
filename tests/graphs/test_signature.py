"""Which graphs a checkpoint has, their inputs and outputs, and the models that they do not cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.graphs.signature import CLASSES, INPUTS, NAMES, TEXT_TO_IMAGE, graphs, input_shapes, with_whole_prompts


def test_a_checkpoint_has_four_graphs_with_free_batch_and_size(random_folder: Path) -> None:
    by_name = {graph.name: graph for graph in graphs(Folder(random_folder))}
    assert {name: graph.component for name, graph in by_name.items()} == {
        "text_encoder": "text_encoder",
        "unet": "unet",
        "vae_decoder": "vae",
        "vae_encoder": "vae",
    }
    assert list(by_name["unet"].inputs) == ["sample", "timestep", "encoder_hidden_states"]
    assert by_name["vae_decoder"].outputs == {"sample": {0: "batch", 2: "height * 8", 3: "width * 8"}}


def test_inputs_have_shapes_in_the_order_of_the_graph(random_folder: Path) -> None:
    configs = {name: Folder(random_folder).config(name) for name in CLASSES}
    for name in NAMES:
        assert tuple(input_shapes(name, configs, 2, 8, 12)) == INPUTS[name]
    assert input_shapes("unet", configs, 2, 8, 12)["timestep"] == ()
    assert input_shapes("vae_encoder", configs, 2, 8, 12) == {"sample": (2, 3, 64, 96)}
    assert set(NAMES) - set(TEXT_TO_IMAGE) == {"vae_encoder"}


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
def test_other_models_are_refused(base: Path, file: str, changes: dict[str, Any], words: str) -> None:
    rewrite(base / file, **changes)
    with pytest.raises(ErasecError) as caught:
        graphs(Folder(base))
    assert caught.value.what == words
    assert caught.value.why


def test_whole_prompts_fix_one_axis_alone(random_folder: Path) -> None:
    text = graphs(Folder(random_folder))[0]
    whole_text = with_whole_prompts(text)
    assert whole_text.inputs == {"input_ids": {0: "batch"}}
    assert whole_text.outputs == {"last_hidden_state": {0: "batch"}, "pooler_output": {0: "batch"}}
    assert text.inputs == {"input_ids": {0: "batch", 1: "sequence"}}
