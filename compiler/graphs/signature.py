"""The graphs of a checkpoint: which there are, and their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.folder import downscale
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder


PRECISIONS = ("fp32", "fp16")
CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
COPIED = ("scheduler", "tokenizer", "feature_extractor")
LEFT_OUT = ("safety_checker", "image_encoder")  # pipelines load them from elsewhere, or run without them
# Config keys of a UNet with more inputs than the graph has.
MORE_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)

# By graph: the component whose weights it holds, and its inputs and outputs in their order.
COMPONENTS = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}
INPUTS = {
    "text_encoder": ("input_ids",),
    "unet": ("sample", "timestep", "encoder_hidden_states"),
    "vae_decoder": ("latent_sample",),
    "vae_encoder": ("sample",),
}
OUTPUTS = {
    "text_encoder": ("last_hidden_state", "pooler_output"),
    "unet": ("out_sample",),
    "vae_decoder": ("sample",),
    "vae_encoder": ("latent_parameters",),
}
NAMES = tuple(COMPONENTS)
# The graphs that make an image from a prompt; the VAE's encoder serves image to image only.
TEXT_TO_IMAGE = ("text_encoder", "unet", "vae_decoder")

Axes = Mapping[int, str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One file model.onnx: its folder ``name``, the component whose weights it holds, its inputs and its outputs.

    Inputs and outputs are by name, each with the names of its dynamic axes. The name of an output's axis may be an
    expression such as "height * 8", which ONNX pipelines evaluate.
    """

    name: str
    component: str
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


def graphs(checkpoint: Folder) -> tuple[Graph, ...]:
    """The graphs of a checkpoint. Raises ErasecError where it has components or inputs that the graphs do not cover."""
    listed = {name: kind for name, kind in checkpoint.index.items() if isinstance(kind, list) and kind[-1] is not None}
    for name, known in CLASSES.items():
        if name not in listed or listed[name][-1] != known:
            state = f"is a {listed[name][-1]}" if name in listed else "is missing"
            raise ErasecError(
                f"onnx: {name} {state}",
                why=f"the graph of this component is written for {known}",
                where="model_index.json",
                fix="build it for hf: --target hf",
            )
    if extra := sorted(set(listed) - set(CLASSES) - set(COPIED) - set(LEFT_OUT)):
        raise ErasecError(
            f"onnx: the model has a {extra[0]}",
            why="only the layouts of Stable Diffusion 1 and 2 are written as ONNX",
            where="model_index.json",
            fix="build it for hf: --target hf",
        )
    unet = checkpoint.config("unet")
    if more := [key for key in MORE_INPUTS if unet.get(key) is not None]:
        raise ErasecError(
            f"onnx: the unet has {more[0]} = {unet[more[0]]!r}",
            why="such a UNet has more inputs than sample, timestep and encoder_hidden_states",
            where="unet/config.json",
            fix="build it for hf: --target hf",
        )
    batch, tokens = {0: "batch"}, {0: "batch", 1: "sequence"}
    size = {0: "batch", 2: "height", 3: "width"}
    scale = downscale(checkpoint.config("vae"))
    larger = {0: "batch", 2: f"height * {scale}", 3: f"width * {scale}"}
    smaller = {0: "batch", 2: f"height // {scale}", 3: f"width // {scale}"}
    axes: dict[str, tuple[tuple[Axes, ...], tuple[Axes, ...]]] = {
        "text_encoder": ((tokens,), (tokens, batch)),
        "unet": ((size, {}, tokens), (size,)),
        "vae_decoder": ((size,), (larger,)),
        "vae_encoder": ((size,), (smaller,)),
    }
    return tuple(
        Graph(
            name,
            component,
            dict(zip(INPUTS[name], axes[name][0], strict=True)),
            dict(zip(OUTPUTS[name], axes[name][1], strict=True)),
        )
        for name, component in COMPONENTS.items()
    )


def input_shapes(
    name: str, configs: Mapping[str, Mapping[str, Any]], batch: int, height: int, width: int
) -> dict[str, Shape]:
    """Shapes of the inputs of the graph ``name`` for latents of ``height`` x ``width``; a timestep is a scalar, ().

    ``configs`` are those of the components text_encoder, unet and vae.
    """
    text, unet, vae = (configs[component] for component in CLASSES)
    tokens, scale = text["max_position_embeddings"], downscale(vae)
    shapes: dict[str, tuple[Shape, ...]] = {
        "text_encoder": ((batch, tokens),),
        "unet": ((batch, unet["in_channels"], height, width), (), (batch, tokens, unet["cross_attention_dim"])),
        "vae_decoder": ((batch, vae["latent_channels"], height, width),),
        "vae_encoder": ((batch, vae["in_channels"], height * scale, width * scale),),
    }
    return dict(zip(INPUTS[name], shapes[name], strict=True))


def pixel_unit(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The number of pixels of which heights and widths must be multiples for graphs with these configs.

    Each level of a UNet halves the latents, and joins them again with those of the level above: in a graph, without a
    remainder. diffusers resizes them instead.
    """
    return downscale(vae) * downscale(unet)


def num_train_timesteps(checkpoint: Folder) -> int:
    """The number of timesteps that the checkpoint was trained with; 1000 where its scheduler does not say."""
    count: int = checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
    return count


def with_whole_prompts(graph: Graph) -> Graph:
    """A text encoder that takes prompts of the model's full length only.

    A graph with a negative prompt compares each prompt with the empty one, over the full length.
    """

    def fixed(ports: Mapping[str, Axes]) -> dict[str, Axes]:
        return {name: {axis: label for axis, label in axes.items() if axis != 1} for name, axes in ports.items()}

    return replace(graph, inputs=fixed(graph.inputs), outputs=fixed(graph.outputs))
