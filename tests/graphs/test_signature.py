"""Which graphs a checkpoint has, their inputs and outputs, and the models that they do not cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import joint_models
import pytest
import random_models

from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.graphs.signature import NAMES, configs, graphs, input_shapes, layout, with_whole_prompts


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
    folder = Folder(random_folder)
    shapes = {graph.name: input_shapes(graph, configs(folder), 2, 8, 12) for graph in graphs(folder)}
    for graph in graphs(folder):
        assert list(shapes[graph.name]) == list(graph.inputs)
    assert shapes["unet"]["timestep"] == ()
    assert shapes["vae_encoder"] == {"sample": (2, 3, 64, 96)}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Folders of the families that have transformers, and of Stable Diffusion XL."""
    root = tmp_path_factory.mktemp("joint")
    for family in ("sd3", "sd3-no-t5", "flux"):
        joint_models.pipeline(family).save_pretrained(root / family)
    random_models.random_folder(root / "sdxl", "sdxl")
    return {path.name: Folder(path) for path in root.iterdir()}


# The inputs of the denoisers as optimum 2.1 names them, and shapes for two pictures of 8 x 12 latents.
DENOISERS = {
    "sdxl": {
        "sample": (2, 4, 8, 12),
        "timestep": (),
        "encoder_hidden_states": (2, 77, 96),
        "text_embeds": (2, 64),
        "time_ids": (2, 6),
    },
    "sd3": {
        "hidden_states": (2, 4, 8, 12),
        "encoder_hidden_states": (2, 77 + 256, 48),
        "pooled_projections": (2, 40),
        "timestep": (2,),
    },
    "sd3-no-t5": {
        "hidden_states": (2, 4, 8, 12),
        "encoder_hidden_states": (2, 77 + 256, 48),  # zeros in the place of T5's rows
        "pooled_projections": (2, 40),
        "timestep": (2,),
    },
    "flux": {
        "hidden_states": (2, 24, 16),
        "encoder_hidden_states": (2, 512, 48),
        "pooled_projections": (2, 16),
        "timestep": (2,),
        "txt_ids": (512, 3),
        "img_ids": (24, 3),
        "guidance": (2,),
    },
}


@pytest.mark.parametrize("family", [*DENOISERS])
def test_other_families_have_their_own_inputs(joint: dict[str, Folder], family: str) -> None:
    folder = joint[family]
    assert layout(folder) == family.partition("-")[0]
    denoiser = next(graph for graph in graphs(folder) if graph.denoises)
    assert input_shapes(denoiser, configs(folder), 2, 8, 12) == DENOISERS[family]
    assert list(denoiser.inputs) == list(DENOISERS[family])


def test_a_folder_without_t5_has_no_graph_of_it(joint: dict[str, Folder]) -> None:
    names = {family: [graph.name for graph in graphs(folder)] for family, folder in joint.items()}
    assert layout(joint["sd3-no-t5"]) == "sd3"
    assert set(names["sd3"]) - set(names["sd3-no-t5"]) == {"text_encoder_3"}
    assert set().union(*names.values()) == set(NAMES)


def test_text_encoders_give_what_the_denoiser_reads(joint: dict[str, Folder]) -> None:
    outputs = {name: {graph.name: list(graph.outputs) for graph in graphs(folder)} for name, folder in joint.items()}
    hidden = [f"hidden_states.{number}" for number in range(4)]
    assert outputs["sd3"]["text_encoder"] == ["text_embeds", "last_hidden_state", *hidden]
    assert outputs["sdxl"]["text_encoder"] == ["last_hidden_state", "pooler_output", *hidden[:3]]
    assert outputs["sdxl"]["text_encoder_2"] == ["text_embeds", "last_hidden_state", *hidden]
    assert outputs["flux"]["text_encoder"] == ["last_hidden_state", "pooler_output"]
    assert outputs["flux"]["text_encoder_2"] == ["last_hidden_state"]


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet3D"]}, "onnx: unet is a UNet3D"),
        ("model_index.json", {"vae": [None, None]}, "onnx: vae is missing"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "T"]},
            "onnx: the model has the component text_encoder_2",
        ),
        ("model_index.json", {"image_adapter": ["diffusers", "T"]}, "onnx: the model has the component image_adapter"),
        (
            "unet/config.json",
            {"addition_embed_type": "text_time"},
            "onnx: the unet has addition_embed_type = 'text_time'",
        ),
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
