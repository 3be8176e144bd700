"""Maps between the tensor names of diffusers folders and of original single files (LDM), in both directions.

All functions work on names and shapes. They read no tensors and open no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from erasec.errors import ErasecError
from erasec.family import FAMILIES, Shape, SingleFileLayout
from erasec.ldm.module_names import SHARES, VIT_H_LAYERS, Pair, count, tensor_pairs

# The families with a single-file layout.
LAYOUTS = {name: family.single_file for name, family in FAMILIES.items() if family.single_file is not None}

# The two names of T5's token embedding: files have one of them, or both.
TIED = ("shared.weight", "encoder.embed_tokens.weight")
# Beginnings of the names of T5's tensors. Those of CLIP, whatever version of the libraries saved them, are others.
T5_NAMES = ("shared.", "encoder.embed_tokens.", "encoder.block.", "encoder.final_layer_norm.")

# Modules of the VAE's attention: the names in the published folders of SD 1 and SD 2, and the present names.
OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

PROJECTION = "text_projection.weight"
# Tensors that are left out of the other layout: constants, training state, and what no pipeline reads.
UNUSED_IN_FOLDERS = ("text_model.embeddings.position_ids",)
UNUSED_IN_FILES = {
    "clip": ("text_model.embeddings.position_ids", "logit_scale"),
    "openclip": ("logit_scale", "attn_mask"),
    "vae": ("loss.",),
}
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")

# Other kinds of files that users may give by mistake, by the prefix of a tensor name.
OTHERS = (
    ("lora_", "a LoRA: layers to add to a model, not a model"),
    ("control_model.", "a ControlNet"),
    ("model.diffusion_model.double_blocks.", "a relative of FLUX.1, such as FLUX.2 or Chroma"),
    ("double_blocks.", "a relative of FLUX.1, such as FLUX.2 or Chroma"),
    ("model.diffusion_model.joint_blocks.", "a relative of Stable Diffusion 3"),
    ("joint_blocks.", "a relative of Stable Diffusion 3"),
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
    in the file and a matrix in the folder. If ``swapped``, the two halves of its rows have changed places in the file.
    """

    key: str
    shape: Shape
    start: int = 0
    rows: int = 0
    transposed: bool = False
    linear: bool = False
    swapped: bool = False

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
    if component.startswith("text_encoder") and not key.startswith(T5_NAMES):
        bare = key.removeprefix("text_model.")
        return bare if bare.startswith("text_projection.") else f"text_model.{bare}"
    parts = key.split(".")
    if component == "vae" and len(parts) > 1 and "attentions" in parts:
        parts[-2] = OLD_VAE.get(parts[-2], parts[-2])
    return ".".join(parts)


def detect_single(shapes: Mapping[str, Shape]) -> str:
    """Detect the family of a single file from its tensors, shapes by tensor name. Returns the family's name.

    Of a transformer, the prefix and the other components may be missing. Raises ErasecError if it is not a checkpoint
    of a known family, with a guess at what else it may be.
    """
    prefixes = {prefix for layout in LAYOUTS.values() for prefix in layout.prefixes.values()}
    present = {prefix for prefix in prefixes if any(key.startswith(prefix) for key in shapes)}
    fitting = [family for family in LAYOUTS if LAYOUTS[family].detect.fits(_prefixed(family, shapes))]
    refiner = any(key.startswith("conditioner.embedders.0.model.") for key in shapes)
    if len(fitting) != 1 or refiner:
        raise _unknown(shapes)
    family = FAMILIES[fitting[0]]
    own = LAYOUTS[family.name]
    missing = [name for name in family.components if own.prefixes[name] not in present]
    if missing and not own.modules:
        raise ErasecError(
            f"this single file has no {missing[0]}",
            why=f"its UNet is that of {family.name}, but no tensor name begins with {own.prefixes[missing[0]]}",
            fix="give a complete checkpoint: UNet, VAE and text encoders in one file",
        )
    return family.name


def _prefixed(family: str, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """``shapes``; of a transformer alone whose names lack the prefix, with the prefix."""
    own = layout(family)
    prefix = own.prefixes[FAMILIES[family].denoiser]
    if not own.modules or any(key.startswith(prefix) for key in shapes):
        return shapes
    return {prefix + key: shape for key, shape in shapes.items()}


def to_single(family: str, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[tuple[str, str], TensorLocation]:
    """Where a single file stores each tensor of a diffusers folder: {(component, tensor name): Place}.

    ``shapes`` is {component: {tensor name: shape}}. What ``stored_names`` lacks is left out. Raises ErasecError for a
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
        names = stored_names(family, component, tensors)
        pairs = {pair.folder: pair for pair in tensor_pairs(family, component, names.values(), single=False)}
        for key, name in names.items():
            if name not in pairs:
                raise ErasecError(
                    f"{component}: {key} has no place in a single file",
                    why=f"the layout of {family} has no such module",
                    fix="merge or remove adapters first; a model of another structure has no single-file layout",
                )
            place = _place(prefix, pairs[name], key, tensors[key])
            if other := owners.get((place.key, place.start)):
                raise ErasecError(f"{component}: {other} and {key} are the same tensor under two names")
            owners[place.key, place.start] = key
            places[component, key] = place
    filled = Counter[tuple[str, Shape]]()
    for place in places.values():
        filled[place.key, place.shape] += place.rows or place.shape[0]
    for place in places.values():
        if place.rows and filled[place.key, place.shape] != place.shape[0]:
            raise ErasecError(
                f"a part of {place.key} is missing",
                why="it consists of matrices of one layer, such as q, k and v, whose sizes fit together",
                fix="fetch the folder again: it is damaged or incomplete",
            )
    return places


def stored_names(family: str, component: str, keys: Iterable[str]) -> dict[str, str]:
    """By the ``keys`` of a folder's component, the canonical names of the tensors that a single file holds.

    It does not hold constants, the second name of T5's token embedding, and a projection for which readers take the
    identity.
    """
    own = layout(family)
    names = {key: canonical(component, key) for key in keys}
    if component in own.t5:
        names, unused = _one_embedding(names), TIED[1:]
    else:
        unused = (*UNUSED_IN_FOLDERS, *((PROJECTION,) if component in own.unprojected else ()))
    return {key: name for key, name in names.items() if name not in unused}


def _one_embedding(names: dict[str, str]) -> dict[str, str]:
    """Names of T5's tensors, with the first name of its token embedding where that is missing."""
    if TIED[0] in names.values():
        return names
    return {key: TIED[0] if name == TIED[1] else name for key, name in names.items()}


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
    bare = _prefixed(family, shapes) is not shapes
    others = tuple(prefix for name, prefix in layout(family).prefixes.items() if name != FAMILIES[family].denoiser)
    for component, prefix in layout(family).prefixes.items():
        if bare and component == FAMILIES[family].denoiser:
            names = {key: key for key in shapes if not key.startswith(others)}
        else:
            names = {key: _file_name(family, component, key, prefix) for key in shapes if key.startswith(prefix)}
        names = _one_embedding(names) if component in layout(family).t5 else names
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
                places[component, pair.folder] = _place_of_file(key, pair, shapes[key])
    return places


def _place_of_file(key: str, pair: Pair, shape: Shape) -> TensorLocation:
    """The place of the tensor of ``pair`` in the file's tensor ``key`` of this ``shape``."""
    if pair.form in SHARES:
        first, count_of, shares = SHARES[pair.form]
        rows = _share_rows(key, shape, shares)
        return TensorLocation(key, shape, first * rows, count_of * rows)
    if pair.form == "swapped":
        _share_rows(key, shape, 2)
    linear = pair.form == "linear" and len(shape) == 4
    return TensorLocation(
        key, shape, transposed=pair.form == "transposed", linear=linear, swapped=pair.form == "swapped"
    )


def _file_name(family: str, component: str, key: str, prefix: str) -> str:
    """The name of a single file's tensor without its component's prefix, as the original programs write it.

    Some programs leave ``text_model.`` out of the names of a CLIP text encoder, and ComfyUI and A1111 accept that.
    """
    name = key.removeprefix(prefix)
    clip = component in FAMILIES[family].text_encoders and component not in LAYOUTS[family].openclip
    return canonical(component, name) if clip and not name.startswith(UNUSED_IN_FILES["clip"]) else name


def _place(prefix: str, pair: Pair, name: str, shape: Shape) -> TensorLocation:
    """The place in a file of the folder's tensor ``name`` of this ``shape``."""
    key = prefix + pair.file
    if pair.form in SHARES:
        first, count_of, shares = SHARES[pair.form]
        rows = _share_rows(name, shape, count_of)
        return TensorLocation(key, (shares * rows, *shape[1:]), first * rows, count_of * rows)
    if pair.form == "swapped":
        _share_rows(name, shape, 2)
        return TensorLocation(key, shape, swapped=True)
    if pair.form == "linear" and len(shape) == 2:
        return TensorLocation(key, (*shape, 1, 1), linear=True)
    return (
        TensorLocation(key, shape[::-1], transposed=True) if pair.form == "transposed" else TensorLocation(key, shape)
    )


def _share_rows(key: str, shape: Shape, shares: int) -> int:
    """The rows of one share of a tensor. Raises ErasecError if it has not as many shares of one size."""
    if not shape or shape[0] % shares:
        raise ErasecError(f"{key} is {shape}", why=f"its rows should be {shares} parts of one size")
    return shape[0] // shares


def layout(family: str) -> SingleFileLayout:
    """The single-file layout of a family. Raises ErasecError for a family without one."""
    if family not in LAYOUTS:
        raise ErasecError(f"{family} has no single-file layout", why=f"families with one: {', '.join(LAYOUTS)}")
    return LAYOUTS[family]


def _unused(family: str, component: str, names: Iterable[str]) -> tuple[str, ...]:
    """Prefixes of the tensor names of a component that a folder does not contain."""
    own = LAYOUTS[family]
    if component in own.t5:
        return TIED[1:]
    if component in FAMILIES[family].text_encoders and component not in own.openclip:
        configs = FAMILIES[family].configs or FAMILIES[family].joint_configs
        projected = configs is not None and component in configs.projected and component not in own.unprojected
        return UNUSED_IN_FILES["clip"] if projected else (*UNUSED_IN_FILES["clip"], PROJECTION)
    if component not in own.openclip:
        return UNUSED_IN_FILES.get(component, ())
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
