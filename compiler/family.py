"""Model families as tables, and how to tell a family from the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from erasec.errors import ErasecError

Shape = tuple[int, ...]

PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"}
ATTENTIONS = {"attn1": "self", "attn2": "cross"}


@dataclass(frozen=True, order=True)
class Site:
    """One weight matrix that a pass may edit; ``shape`` is (d_out, d_in)."""

    component: str
    key: str
    shape: Shape
    attn: str
    proj: str
    block: str

    @property
    def label(self) -> str:
        return f"{self.block} {self.attn} {self.proj}"


@dataclass(frozen=True)
class Family:
    """A layout: which components hold weights, which of them make the text states, and the weights files' names."""

    name: str
    components: tuple[str, ...]
    text_encoders: tuple[str, ...]
    denoiser: str = "unet"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sd1", ("text_encoder", "unet", "vae"), ("text_encoder",)),
        Family("sd2", ("text_encoder", "unet", "vae"), ("text_encoder",)),
        Family("sdxl", ("text_encoder", "text_encoder_2", "unet", "vae"), ("text_encoder", "text_encoder_2")),
    )
}


def detect(unet: Mapping[str, Shape]) -> Family:
    """Tell the family from the denoiser's tensors: SDXL embeds sizes, SD 2 projects linearly, SD 1 by convolution.

    Raises ErasecError for anything else: a guess here would edit the wrong matrices.
    """
    entry = next((shape for key, shape in unet.items() if key.endswith("attentions.0.proj_in.weight")), None)
    has_context = any(key.endswith("attn2.to_k.weight") for key in unet)
    if entry is not None and has_context and "conv_in.weight" in unet:
        if "add_embedding.linear_1.weight" in unet:
            return FAMILIES["sdxl"]
        return FAMILIES["sd1" if len(entry) == 4 else "sd2"]
    seen = ", ".join(f"{key} {shape}" for key, shape in sorted(unet.items())[:3])
    raise ErasecError(
        "this denoiser belongs to no family that erasec knows",
        why=f"it has {len(unet)} tensors ({seen}, ...); known: {', '.join(FAMILIES)}",
        fix="a family is one row in compiler/family.py and a rule in detect(); there is no switch to go on regardless",
    )


def sites(component: str, tensors: Mapping[str, Shape]) -> tuple[Site, ...]:
    """Every attention projection of a component, in the order of their keys."""
    found = []
    for key, shape in sorted(tensors.items()):
        parts = key.split(".")
        attn = next((part for part in parts if part in ATTENTIONS), None)
        proj = next((part for part in parts if part in PROJECTIONS), None)
        if attn and proj and parts[-1] == "weight" and len(shape) == 2:
            block = ".".join(parts[: parts.index(attn)]).replace(".transformer_blocks", "").replace("_blocks", "")
            found.append(Site(component, key, shape, ATTENTIONS[attn], PROJECTIONS[proj], block))
    return tuple(found)
