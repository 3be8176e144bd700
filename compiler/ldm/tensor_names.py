"""Tensor names of diffusers folders and of original single files (the LDM layout), each from the other.

Pure functions on names and shapes: no tensor is touched and no file is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from erasec.errors import ErasecError
from erasec.family import Shape
from erasec.ldm import module_names as modules
from erasec.ldm.configs import OLD_VAE
from erasec.ldm.module_names import Pair

PREFIXES: dict[str, dict[str, str]] = {
    "sd1": {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "cond_stage_model.transformer."},
    "sd2": {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "cond_stage_model.model."},
    "sdxl": {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
             "text_encoder": "conditioner.embedders.0.transformer.",
             "text_encoder_2": "conditioner.embedders.1.model."},
}  # fmt: skip

# Parts of both layouts that are constants, training state, or that no pipeline reads
UNUSED_IN_FOLDERS = ("text_model.embeddings.position_ids",)
UNUSED_IN_FILES = {
    "text_encoder": ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"),
    "openclip": ("logit_scale", "attn_mask"),
    "vae": ("loss.",),
    "unet": (),
}
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")

# What else may be given, by how one of its keys begins
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
class Place:
    """Where a tensor of a diffusers folder lies in a single file.

    ``key`` and ``shape`` are the file's tensor, whole. The folder's tensor is ``rows`` rows of it (0: all) from
    ``start``, along dimension 0. ``transposed``: the file has it the other way round. ``linear``: a 1x1 convolution in
    the file, a matrix in the folder.
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
    """The present name of a folder's tensor, as ``from_single`` gives it.

    transformers 5 leaves ``text_model.`` out, and VAEs saved by early diffusers name their attention's parts otherwise.
    """
    if component.startswith("text_encoder"):
        bare = key.removeprefix("text_model.")
        return bare if bare.startswith("text_projection.") else f"text_model.{bare}"
    parts = key.split(".")
    if component == "vae" and len(parts) > 1 and "attentions" in parts:
        parts[-2] = OLD_VAE.get(parts[-2], parts[-2])
    return ".".join(parts)


def detect_single(shapes: Mapping[str, Shape]) -> str:
    """The family's name of a single file, from its keys and shapes. Raises ErasecError that says what it looks like."""
    prefixes = {prefix for parts in PREFIXES.values() for prefix in parts.values()}
    there = {prefix for prefix in prefixes if any(key.startswith(prefix) for key in shapes)}
    entry = next((shape for key, shape in sorted(shapes.items()) if key.endswith(".1.proj_in.weight")), None)
    refiner = any(key.startswith("conditioner.embedders.0.model.") for key in shapes)
    if "model.diffusion_model." not in there or entry is None or refiner:
        raise _unknown(shapes)
    family = "sd1" if len(entry) == 4 else "sd2"
    if "model.diffusion_model.label_emb.0.0.weight" in shapes:
        family = "sdxl"
    if missing := [component for component, prefix in PREFIXES[family].items() if prefix not in there]:
        name = missing[0]
        raise ErasecError(
            f"this single file has no {name}", why=f"its UNet is {family}'s, but no key begins with "
            f"{PREFIXES[family][name]}", fix="give the whole checkpoint: UNet, VAE and text encoders in one file",
        )  # fmt: skip
    return family


def to_single(family: str, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[tuple[str, str], Place]:
    """Where each tensor of a diffusers folder lies in a single file: {(component, key): Place}.

    ``shapes`` is {component: {key: shape}}. Tensors that files leave out (UNUSED_IN_FOLDERS) are left out here.
    Raises ErasecError for a key that has no place, and where two or too few tensors claim one.
    """
    places: dict[tuple[str, str], Place] = {}
    taken: dict[tuple[str, int], str] = {}
    for component, tensors in shapes.items():
        prefix = _prefixes(family).get(component)
        if prefix is None:
            raise ErasecError(f"{family} has no component {component}", why=f"it has {', '.join(PREFIXES[family])}")
        names = {key: canonical(component, key) for key in tensors}
        pairs = {pair.ours: pair for pair in modules.pairs(family, component, names.values(), single=False)}
        for key, name in names.items():
            if name in UNUSED_IN_FOLDERS:
                continue
            if name not in pairs:
                raise ErasecError(
                    f"{component}: {key} has no place in a single file", why=f"{family}'s layout has no such module",
                    fix="fuse or remove adapters first; a model of another structure has no single-file layout",
                )  # fmt: skip
            place = _place(prefix, pairs[name], tensors[key])
            if other := taken.get((place.key, place.start)):
                raise ErasecError(f"{component}: {other} and {key} are the same tensor under two names")
            taken[place.key, place.start] = key
            places[component, key] = place
    for place in places.values():
        if place.rows and any((place.key, start) not in taken for start in range(0, place.shape[0], place.rows)):
            raise ErasecError(
                f"a part of {place.key} is missing", why="it holds q, k and v of one layer, of one size",
                fix="the folder is damaged or not whole: fetch it again",
            )  # fmt: skip
    return places


def from_single(family: str, shapes: Mapping[str, Shape]) -> dict[tuple[str, str], Place]:
    """Which tensors of a diffusers folder a single file holds: {(component, key): Place}, the inverse of ``to_single``.

    Keys of no component (noise schedules, training state) and what no pipeline reads (UNUSED_IN_FILES, and the last
    layer of SD 2's OpenCLIP) are left out. Raises ErasecError for unknown keys within a component, and for a file that
    holds averaged (EMA) weights beside the others.
    """
    if any(key.startswith("model_ema.") and key not in EMA_COUNTERS for key in shapes):
        raise ErasecError(
            "this file holds two UNets, model.* and model_ema.*", why="which of them is meant is not guessed",
            fix="prune it: keep the tensors whose keys do not begin with model_ema. (or copy the averaged weights over "
            "the others first, if you mean those), and save it again as safetensors",
        )  # fmt: skip
    places: dict[tuple[str, str], Place] = {}
    for component, prefix in _prefixes(family).items():
        own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        pairs: dict[str, list[Pair]] = {}
        for pair in modules.pairs(family, component, own, single=True):
            pairs.setdefault(pair.theirs, []).append(pair)
        unused = _unused(family, component, own)
        for name, shape in own.items():
            if name not in pairs and not name.startswith(unused):
                raise ErasecError(
                    f"the file's {prefix}{name} is no tensor of {family}'s {component}",
                    why="its name is damaged, or the model has a part that erasec does not know",
                )
            for pair in () if name.startswith(unused) else pairs[name]:
                if pair.form in modules.THIRDS:
                    rows = _third(prefix + name, shape)
                    place = Place(prefix + name, shape, rows * modules.THIRDS.index(pair.form), rows)
                else:
                    linear = pair.form == "linear" and len(shape) == 4
                    place = Place(prefix + name, shape, transposed=pair.form == "transposed", linear=linear)
                places[component, pair.ours] = place
    return places


def _place(prefix: str, pair: Pair, shape: Shape) -> Place:
    key = prefix + pair.theirs
    if pair.form in modules.THIRDS:
        rows = shape[0]
        return Place(key, (3 * rows, *shape[1:]), rows * modules.THIRDS.index(pair.form), rows)
    if pair.form == "linear" and len(shape) == 2:
        return Place(key, (*shape, 1, 1), linear=True)
    return Place(key, shape[::-1], transposed=True) if pair.form == "transposed" else Place(key, shape)


def _third(key: str, shape: Shape) -> int:
    if not shape or shape[0] % 3:
        raise ErasecError(f"{key} is {shape}", why="it should hold q, k and v, one below the other, of one size")
    return shape[0] // 3


def _prefixes(family: str) -> dict[str, str]:
    if family not in PREFIXES:
        raise ErasecError(f"{family} has no single-file layout here", why=f"known: {', '.join(PREFIXES)}")
    return PREFIXES[family]


def _unused(family: str, component: str, names: Iterable[str]) -> tuple[str, ...]:
    """How the names begin that belong to a component of a file and to no folder."""
    if (family, component) not in modules.OPENCLIP:
        return UNUSED_IN_FILES[component]
    if family != "sd2":
        return UNUSED_IN_FILES["openclip"]
    # SD 2 reads the layer before the last: folders end there. OpenCLIP's own files are whole and have a projection.
    names = set(names)
    layers = modules.count(names, "transformer.resblocks.")
    whole = "text_projection" in names or layers == modules.VIT_H_LAYERS
    last = (f"transformer.resblocks.{layers - 1}.",) if whole else ()
    return (*UNUSED_IN_FILES["openclip"], "text_projection", *last)


def _unknown(shapes: Mapping[str, Shape]) -> ErasecError:
    looks = next((words for start, words in OTHERS if any(key.startswith(start) for key in shapes)), "")
    if any(part in key for key in shapes for part in (".lora_", ".lora.", "_lora.")):
        looks = OTHERS[0][1]
    seen = ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items())[:3])
    return ErasecError(
        "this file is no single-file checkpoint that erasec knows",
        why=f"it looks like {looks}" if looks else f"it has {len(shapes)} tensors ({seen}, ...)",
        fix=f"give a whole checkpoint ({', '.join(PREFIXES)}) in the original layout, or a diffusers folder",
    )
