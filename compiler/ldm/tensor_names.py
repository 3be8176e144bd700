"""Maps between the tensor names of diffusers folders and of original single files (LDM), in both directions.

All functions work on names and shapes. They read no tensors and open no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from erasec.errors import ErasecError
from erasec.family import FAMILIES, Shape, SingleFileLayout
from erasec.ldm.module_names import THIRDS, VIT_H_LAYERS, Pair, count, tensor_pairs

# The families with a single-file layout.
LAYOUTS = {name: family.single_file for name, family in FAMILIES.items() if family.single_file is not None}

# The two names of T5's token embedding: files have one of them, or both.
TIED = ("shared.weight", "encoder.embed_tokens.weight")

# Modules of the VAE's attention: the names in the published folders of SD 1 and SD 2, and the present names.
OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Tensors that are left out of the other layout: constants, training state, and what no pipeline reads.
UNUSED_IN_FOLDERS = ("text_model.embeddings.position_ids",)
UNUSED_IN_FILES = {
    "text_encoder": ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"),
    "openclip": ("logit_scale", "attn_mask"),
    "vae": ("loss.",),
    "unet": (),
}
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")

# Other kinds of files that users may give by mistake, by the prefix of a tensor name.
OTHERS = (
    ("lora_", "a LoRA: layers to add to a model, not a model"),
    ("control_model.", "a ControlNet"),
    ("model.diffusion_model.double_blocks.", "a Flux model"),
    ("double_blocks.", "a Flux model"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("emb_params", "a textual inversion"),
    ("down_blocks.", "the UNet alone of a diffusers folder"),
    ("input_blocks.", "a UNet alone, without the prefix it has in a single file"),
    ("encoder.down_blocks.", "the VAE alone of a diffusers folder"),
    ("encoder.down.", "a VAE alone"),
    ("text_model.", "a text encoder alone"),
    ("encoder.layers.", "a text encoder alone"),
    ("transformer_blocks.", "the transformer alone of a diffusers folder"),
)


@dataclass(frozen=True)
class TensorLocation:
    """Where a single file stores a tensor of a diffusers folder.

    ``key`` and ``shape`` are those of the file's tensor. The folder's tensor is ``rows`` rows of it (0 means all),
    starting at row ``start``. If ``transposed``, the file stores its transpose. If ``linear``, it is a 1x1 convolution
    in the file and a matrix in the folder.
    """

    key: str
    shape: Shape
    start: int = 0
    rows: int = 0
    transposed: bool = False
    linear: bool = False

    @property
    def folder_shape(self) -> Shape:
        """The shape of the folder's tensor."""
        shape = (self.rows or self.shape[0], *self.shape[1:])
        if self.linear:
            return shape[:2]
        return shape[::-1] if self.transposed else shape


def canonical(component: str, key: str) -> str:
    """The present name of a folder's tensor, as ``from_single`` returns it, whatever version of the libraries saved it.

    transformers 5 omits the prefix ``text_model.``, and early diffusers had other names in the VAE's attention.
    """
    if component.startswith("text_encoder"):
        bare = key.removeprefix("text_model.")
        return bare if bare.startswith("text_projection.") else f"text_model.{bare}"
    parts = key.split(".")
    if component == "vae" and len(parts) > 1 and "attentions" in parts:
        parts[-2] = OLD_VAE.get(parts[-2], parts[-2])
    return ".".join(parts)


def detect_single(shapes: Mapping[str, Shape]) -> str:
    """Detect the family of a single file from its tensors, shapes by tensor name. Returns the family's name.

    Raises ErasecError if it is not a complete checkpoint of a known family, with a guess at what else it may be.
    """
    prefixes = {prefix for layout in LAYOUTS.values() for prefix in layout.prefixes.values()}
    present = {prefix for prefix in prefixes if any(key.startswith(prefix) for key in shapes)}
    fitting = [family for family, layout in LAYOUTS.items() if layout.detect.fits(shapes)]
    refiner = any(key.startswith("conditioner.embedders.0.model.") for key in shapes)
    if "model.diffusion_model." not in present or len(fitting) != 1 or refiner:
        raise _unknown(shapes)
    family = fitting[0]
    if missing := [component for component, prefix in LAYOUTS[family].prefixes.items() if prefix not in present]:
        name = missing[0]
        raise ErasecError(
            f"this single file has no {name}",
            why=f"its UNet is that of {family}, but no tensor name begins with {LAYOUTS[family].prefixes[name]}",
            fix="give a complete checkpoint: UNet, VAE and text encoders in one file",
        )
    return family


def to_single(family: str, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[tuple[str, str], TensorLocation]:
    """Where a single file stores each tensor of a diffusers folder: {(component, tensor name): Place}.

    ``shapes`` is {component: {tensor name: shape}}. Tensors in UNUSED_IN_FOLDERS are left out. Raises ErasecError for a
    tensor that has no place in a single file, for two tensors with the same place, and if a part of a joint tensor is
    missing.
    """
    places: dict[tuple[str, str], TensorLocation] = {}
    owners: dict[tuple[str, int], str] = {}
    for component, tensors in shapes.items():
        prefix = layout(family).prefixes.get(component)
        if prefix is None:
            raise ErasecError(
                f"{family} has no component {component}", why=f"it has {', '.join(LAYOUTS[family].prefixes)}"
            )
        names = {key: canonical(component, key) for key in tensors}
        pairs = {pair.folder: pair for pair in tensor_pairs(family, component, names.values(), single=False)}
        for key, name in names.items():
            if name in UNUSED_IN_FOLDERS:
                continue
            if name not in pairs:
                raise ErasecError(
                    f"{component}: {key} has no place in a single file",
                    why=f"the layout of {family} has no such module",
                    fix="merge or remove adapters first; a model of another structure has no single-file layout",
                )
            place = _place(prefix, pairs[name], tensors[key])
            if other := owners.get((place.key, place.start)):
                raise ErasecError(f"{component}: {other} and {key} are the same tensor under two names")
            owners[place.key, place.start] = key
            places[component, key] = place
    for place in places.values():
        if place.rows and any((place.key, start) not in owners for start in range(0, place.shape[0], place.rows)):
            raise ErasecError(
                f"a part of {place.key} is missing",
                why="it consists of q, k and v of one layer, all of one size",
                fix="fetch the folder again: it is damaged or incomplete",
            )
    return places


def from_single(family: str, shapes: Mapping[str, Shape]) -> dict[tuple[str, str], TensorLocation]:
    """The tensors of a diffusers folder that a single file stores: {(component, tensor name): Place}.

    This is the inverse of ``to_single``. Tensors that belong to no component (noise schedules, training state) are left
    out, and so are those that no pipeline reads (UNUSED_IN_FILES, and the last layer of SD 2's OpenCLIP). Raises
    ErasecError for an unknown tensor within a component, and for a file with a second, averaged UNet (EMA).
    """
    if any(key.startswith("model_ema.") and key not in EMA_COUNTERS for key in shapes):
        raise ErasecError(
            "this file holds two UNets, model.* and model_ema.*",
            why="erasec cannot know which of them to edit",
            fix="prune it: keep the tensors whose names do not begin with model_ema. and save it again as safetensors "
            "(to use the averaged weights, copy them over the others first)",
        )
    places: dict[tuple[str, str], TensorLocation] = {}
    for component, prefix in layout(family).prefixes.items():
        names = {key: _file_name(family, component, key, prefix) for key in shapes if key.startswith(prefix)}
        pairs: dict[str, list[Pair]] = {}
        for pair in tensor_pairs(family, component, names.values(), single=True):
            pairs.setdefault(pair.file, []).append(pair)
        unused = _unused(family, component, names.values())
        for key, name in names.items():
            if name not in pairs and not name.startswith(unused):
                raise ErasecError(
                    f"the file's {key} is no tensor of {family}'s {component}",
                    why="its name is damaged, or the model has a module that erasec does not know",
                )
            for pair in () if name.startswith(unused) else pairs[name]:
                if other := places.get((component, pair.folder)):
                    raise ErasecError(f"{component}: {other.key} and {key} are the same tensor under two names")
                if pair.form in THIRDS:
                    rows = _third_rows(key, shapes[key])
                    place = TensorLocation(key, shapes[key], rows * THIRDS.index(pair.form), rows)
                else:
                    linear = pair.form == "linear" and len(shapes[key]) == 4
                    place = TensorLocation(key, shapes[key], transposed=pair.form == "transposed", linear=linear)
                places[component, pair.folder] = place
    return places


def _file_name(family: str, component: str, key: str, prefix: str) -> str:
    """The name of a single file's tensor without its component's prefix, as the original programs write it.

    Some programs leave ``text_model.`` out of the names of a CLIP text encoder, and ComfyUI and A1111 accept that.
    """
    name = key.removeprefix(prefix)
    clip = component in FAMILIES[family].text_encoders and component not in LAYOUTS[family].openclip
    return canonical(component, name) if clip and not name.startswith(UNUSED_IN_FILES[component]) else name


def _place(prefix: str, pair: Pair, shape: Shape) -> TensorLocation:
    key = prefix + pair.file
    if pair.form in THIRDS:
        rows = shape[0]
        return TensorLocation(key, (3 * rows, *shape[1:]), rows * THIRDS.index(pair.form), rows)
    if pair.form == "linear" and len(shape) == 2:
        return TensorLocation(key, (*shape, 1, 1), linear=True)
    return (
        TensorLocation(key, shape[::-1], transposed=True) if pair.form == "transposed" else TensorLocation(key, shape)
    )


def _third_rows(key: str, shape: Shape) -> int:
    if not shape or shape[0] % 3:
        raise ErasecError(f"{key} is {shape}", why="it should be q, k and v of one size, concatenated along its rows")
    return shape[0] // 3


def layout(family: str) -> SingleFileLayout:
    """The single-file layout of a family. Raises ErasecError for a family without one."""
    if family not in LAYOUTS:
        raise ErasecError(f"{family} has no single-file layout", why=f"families with one: {', '.join(LAYOUTS)}")
    return LAYOUTS[family]


def _unused(family: str, component: str, names: Iterable[str]) -> tuple[str, ...]:
    """Prefixes of the tensor names of a component that a folder does not contain."""
    if component not in LAYOUTS[family].openclip:
        return UNUSED_IN_FILES[component]
    if not LAYOUTS[family].drops_last_layer:
        return UNUSED_IN_FILES["openclip"]
    # SD 2 reads the state before the last layer, so folders lack that layer. A file may have it: with OpenCLIP's
    # projection, or with OpenCLIP's number of layers, the encoder is complete.
    names = set(names)
    layers = count(names, "transformer.resblocks.")
    complete = "text_projection" in names or layers == VIT_H_LAYERS
    last = (f"transformer.resblocks.{layers - 1}.",) if complete else ()
    return (*UNUSED_IN_FILES["openclip"], "text_projection", *last)


def _unknown(shapes: Mapping[str, Shape]) -> ErasecError:
    """The error for a file that is no checkpoint of a known family, with a guess at what it is."""
    guess = next((kind for prefix, kind in OTHERS if any(key.startswith(prefix) for key in shapes)), "")
    if any(part in key for key in shapes for part in (".lora_", ".lora.", "_lora.")):
        guess = OTHERS[0][1]
    first = ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items())[:3])
    return ErasecError(
        "this file is no single-file checkpoint that erasec knows",
        why=f"it looks like {guess}" if guess else f"it has {len(shapes)} tensors ({first}, ...)",
        fix=f"give a complete checkpoint ({', '.join(LAYOUTS)}) in the original layout, or a diffusers folder",
    )
