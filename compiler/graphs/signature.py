"""The graphs of a checkpoint: which there are, and their inputs and outputs.

Graphs and their inputs and outputs have the names that optimum gives them, so that its pipelines load the folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.folder import downscale, pooled_width
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from erasec.checkpoint.configs import Config
    from erasec.checkpoint.folder import Folder


PRECISIONS = ("fp32", "fp16")
CLIP, PROJECTED_CLIP, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
UNET, SD3, FLUX, VAE = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "AutoencoderKL"
# The components of each layout that has graphs, with their classes in transformers and diffusers. ``layout`` chooses
# the first of those that fit equally well.
LAYOUTS: dict[str, dict[str, str]] = {
    "sd": {"text_encoder": CLIP, "unet": UNET, "vae": VAE},
    "sdxl": {"text_encoder": CLIP, "text_encoder_2": PROJECTED_CLIP, "unet": UNET, "vae": VAE},
    "sd3": {
        "text_encoder": PROJECTED_CLIP,
        "text_encoder_2": PROJECTED_CLIP,
        "text_encoder_3": T5,
        "transformer": SD3,
        "vae": VAE,
    },
    "flux": {"text_encoder": CLIP, "text_encoder_2": T5, "transformer": FLUX, "vae": VAE},
}
OPTIONAL = ("text_encoder_3",)
TRANSFORMERS = (CLIP, PROJECTED_CLIP, T5)  # the classes of the library transformers
COPIED = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor")
LEFT_OUT = ("safety_checker", "image_encoder")  # pipelines load them from elsewhere, or run without them
# Config keys of a UNet with more inputs than the graph has, with the values that graphs cover.
MORE_INPUTS: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "time_cond_proj_dim": (None,),
}

# The two graphs of a VAE; every other component has one graph of its name.
VAE_GRAPHS = ("vae_decoder", "vae_encoder")
COMPONENTS = tuple(sorted({component for components in LAYOUTS.values() for component in components}))
NAMES = (*(component for component in COMPONENTS if component != "vae"), *VAE_GRAPHS)
DENOISERS = ("unet", "transformer")
TEXT_STATES = "encoder_hidden_states"
PLACES = ("txt_ids", "img_ids")  # inputs of FLUX without a batch: the places of tokens and of patches
HIDDEN = "hidden_states."  # and the number of layers before it: outputs of CLIP besides its last states
# Tokens of T5 where neither its config nor a caller says how many: those of diffusers' pipelines.
T5_TOKENS = {"sd3": 256, "flux": 512}

Axes = Mapping[int, str]
Ports = Mapping[str, Axes]
Shape = tuple[int, ...]
Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Graph:
    """One file model.onnx: its folder ``name``, the component whose weights it holds, its inputs and its outputs.

    ``kind`` is the component's class. Inputs and outputs are by name, each with the names of its dynamic axes. The name
    of an output's axis may be an expression such as "height * 8", which ONNX pipelines evaluate.
    """

    name: str
    component: str
    kind: str
    inputs: Ports
    outputs: Ports

    @property
    def encodes_text(self) -> bool:
        return self.kind in TRANSFORMERS

    @property
    def denoises(self) -> bool:
        return self.name in DENOISERS


def layout(checkpoint: Folder) -> str:
    """The layout of a checkpoint, of LAYOUTS. Raises ErasecError where it has other components or inputs."""
    listed = _listed(checkpoint)
    name, expected = max(LAYOUTS.items(), key=lambda item: _likeness(item[1], listed))
    for component, known in expected.items():
        if listed.get(component) != known and (component in listed or component not in OPTIONAL):
            state = f"is a {listed[component]}" if component in listed else "is missing"
            raise ErasecError(
                f"onnx: {component} {state}",
                why=f"the graph of this component is written for {known}",
                where="model_index.json",
                fix="build it for hf: --target hf",
            )
    if extra := sorted(set(listed) - set(expected)):
        raise ErasecError(
            f"onnx: the model has the component {extra[0]}",
            why=f"graphs are written for models of {', '.join(expected)}",
            where="model_index.json",
            fix="build it for hf: --target hf",
        )
    if "unet" in expected:
        _check_inputs(checkpoint.config("unet"), pooled=name == "sdxl")
    return name


def _listed(checkpoint: Folder) -> dict[str, str]:
    """The components of model_index.json with their classes, but for those that graphs do not need."""
    return {
        name: str(kind[-1])
        for name, kind in checkpoint.index.items()
        if isinstance(kind, list) and kind and kind[-1] is not None and name not in (*COPIED, *LEFT_OUT)
    }


def _likeness(expected: Mapping[str, str], listed: Mapping[str, str]) -> int:
    """How many of the ``listed`` components are as ``expected``, less those that are missing or of another class."""
    return sum(2 * (listed.get(component) == kind) - 1 for component, kind in expected.items())


def _check_inputs(unet: Mapping[str, Any], pooled: bool) -> None:
    """Raise ErasecError for a UNet that has other inputs than the graph."""
    for key, covered in MORE_INPUTS.items():
        expected = covered[-1] if pooled else None
        if (value := unet.get(key)) != expected:
            raise ErasecError(
                f"onnx: the unet has {key} = {value!r}",
                why=f"such a UNet has other inputs than {', '.join(_denoiser_inputs(UNET, pooled))}",
                where="unet/config.json",
                fix="build it for hf: --target hf",
            )


def graphs(checkpoint: Folder) -> tuple[Graph, ...]:
    """The graphs of a checkpoint. Raises ErasecError where it has components or inputs that the graphs do not cover."""
    name = layout(checkpoint)
    return tuple(
        graph for component, config in configs(checkpoint).items() for graph in _graphs_of(component, name, config)
    )


def configs(checkpoint: Folder) -> dict[str, Config]:
    """The configs of the components that have graphs. In a folder of graphs that of the VAE lies beside its decoder.

    Raises ErasecError where the graphs do not cover the checkpoint.
    """
    listed, graphs_alone = _listed(checkpoint), not (checkpoint.root / "vae").is_dir()
    return {
        name: checkpoint.config("vae_decoder" if name == "vae" and graphs_alone else name)
        for name in LAYOUTS[layout(checkpoint)]
        if name in listed
    }


def _graphs_of(component: str, name: str, config: Mapping[str, Any]) -> list[Graph]:
    """The graphs of a component of the layout ``name``."""
    kind = LAYOUTS[name][component]
    batch, tokens, size = {0: "batch"}, {0: "batch", 1: "sequence"}, {0: "batch", 2: "height", 3: "width"}
    if component == "vae":
        scale = downscale(config)
        larger = {0: "batch", 2: f"height * {scale}", 3: f"width * {scale}"}
        smaller = {0: "batch", 2: f"height // {scale}", 3: f"width // {scale}"}
        return [
            Graph("vae_decoder", component, kind, {"latent_sample": size}, {"sample": larger}),
            Graph("vae_encoder", component, kind, {"sample": size}, {"latent_parameters": smaller}),
        ]
    if kind in TRANSFORMERS:
        outputs: dict[str, Axes] = {"last_hidden_state": tokens}
        if kind == PROJECTED_CLIP:
            outputs = {"text_embeds": batch} | outputs
        elif kind == CLIP:
            outputs = outputs | {"pooler_output": batch}
        if kind != T5 and name in ("sdxl", "sd3"):
            outputs |= {f"{HIDDEN}{number}": tokens for number in range(int(config["num_hidden_layers"]) + 1)}
        return [Graph(component, component, kind, {"input_ids": tokens}, outputs)]
    rows = {0: "batch", 1: "image"} if kind == FLUX else size
    dynamic: dict[str, Axes] = {
        "sample": size,
        "hidden_states": rows,
        "timestep": {} if kind == UNET else batch,
        TEXT_STATES: tokens,
        "txt_ids": {0: "sequence"},
        "img_ids": {0: "image"},
    }
    inputs = _denoiser_inputs(kind, name == "sdxl", bool(config.get("guidance_embeds")))
    output = "out_sample" if kind == UNET else "out_hidden_states"
    return [Graph(component, component, kind, {key: dynamic.get(key, batch) for key in inputs}, {output: rows})]


def _denoiser_inputs(kind: str, pooled: bool = False, guidance: bool = False) -> tuple[str, ...]:
    """The inputs of a denoiser: of a UNet that reads a ``pooled`` text state or not, of a FLUX with ``guidance``."""
    if kind == UNET:
        return "sample", "timestep", TEXT_STATES, *(("text_embeds", "time_ids") if pooled else ())
    inputs = "hidden_states", TEXT_STATES, "pooled_projections", "timestep"
    if kind == FLUX:
        inputs += "txt_ids", "img_ids", *(("guidance",) if guidance else ())
    return inputs


def input_shapes(graph: Graph, configs: Configs, batch: int, height: int, width: int) -> dict[str, Shape]:
    """Shapes of the inputs of a graph for latents of ``height`` x ``width``; a timestep of a UNet is a scalar, ().

    ``configs`` are those of all components.
    """
    config, scale = configs[graph.component], downscale(configs["vae"])
    if graph.encodes_text:
        return {"input_ids": (batch, text_length(graph.component, configs))}
    if graph.name == "vae_encoder":
        return {"sample": (batch, config["in_channels"], height * scale, width * scale)}
    if graph.name == "vae_decoder":
        return {"latent_sample": (batch, config["latent_channels"], height, width)}
    parts = {component: text_length(component, configs) for component in configs if component.startswith("text")}
    # The states of CLIP's encoders stand side by side. Those of T5 follow, or zeros; FLUX reads T5's alone.
    tokens = parts["text_encoder"] + (T5_TOKENS["sd3"] if graph.kind == SD3 else 0)
    patches = height // 2 * (width // 2)
    if graph.kind == FLUX:
        tokens = parts["text_encoder_2"]
    channels = config["in_channels"]
    shapes: dict[str, Shape] = {
        "sample": (batch, channels, height, width),
        "hidden_states": (batch, patches, channels) if graph.kind == FLUX else (batch, channels, height, width),
        "timestep": () if graph.kind == UNET else (batch,),
        TEXT_STATES: (batch, tokens, config["cross_attention_dim" if graph.kind == UNET else "joint_attention_dim"]),
        "time_ids": (batch, 6),
        "txt_ids": (tokens, 3),
        "img_ids": (patches, 3),
        "guidance": (batch,),
    }
    if "text_embeds" in graph.inputs or "pooled_projections" in graph.inputs:
        shapes |= dict.fromkeys(("text_embeds", "pooled_projections"), (batch, pooled_width(config)))
    return {name: shapes[name] for name in graph.inputs}


def text_length(component: str, configs: Configs) -> int:
    """How many tokens a text encoder reads of a prompt, in a model with these ``configs``."""
    positions = configs[component].get("max_position_embeddings")
    return int(positions or T5_TOKENS["sd3" if "text_encoder_3" in configs else "flux"])


def pixel_unit(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The number of pixels of which heights and widths must be multiples for graphs with these configs.

    Each level of a UNet halves the latents, and joins them again with those of the level above: in a graph, without a
    remainder. diffusers resizes them instead. A transformer reads patches of 2 x 2 latents.
    """
    return downscale(vae) * downscale(denoiser)


def num_train_timesteps(checkpoint: Folder) -> int:
    """The number of timesteps that the checkpoint was trained with; 1000 where its scheduler does not say."""
    count: int = checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
    return count


def with_whole_prompts(graph: Graph) -> Graph:
    """A text encoder that takes prompts of the model's full length only.

    A graph with a negative prompt compares each prompt with the empty one, over the full length.
    """

    def fixed(ports: Ports) -> dict[str, Axes]:
        return {name: {axis: label for axis, label in axes.items() if axis != 1} for name, axes in ports.items()}

    return replace(graph, inputs=fixed(graph.inputs), outputs=fixed(graph.outputs))
