"""Model families as tables, and how to tell a family from the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from erasec.errors import ErasecError

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Site:
    """One tensor that a pass may edit; of a matrix, ``shape`` is (d_out, d_in).

    ``attn`` says what an attention projection attends to ("self", "cross", "joint", "context"), "text" marks the text
    encoders' tensors and "other" everything else; ``proj`` is what it makes of it, "" where it is no projection.
    """

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
class Part:
    """Rows of text states, one a token: the states of some encoders side by side in one vector.

    ``state`` is the last hidden state, normed; the penultimate, as it is; or the pooled one, a single row for a prompt.
    ``length`` is the number of tokens, 0 for as many as the tokenizer says. Where ``padded``, rows that are narrower
    than the sites that read them end in zeros.
    """

    encoders: tuple[str, ...]
    state: Literal["last", "penultimate", "pooled"] = "last"
    length: int = 0
    padded: bool = False


@dataclass(frozen=True)
class Stream:
    """Text states that some sites of the denoiser read: the rows of its parts, one part after another."""

    name: str
    parts: tuple[Part, ...]
    attn: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A layout: which components hold weights, and what text states the denoiser reads where.

    A folder may do without the components in ``optional``; the rows that they make are then left out.
    """

    name: str
    components: tuple[str, ...]
    streams: tuple[Stream, ...]
    denoiser: str = "unet"
    optional: tuple[str, ...] = ()

    @property
    def text_encoders(self) -> tuple[str, ...]:
        parts = (part for stream in self.streams for part in stream.parts)
        return tuple(sorted({name for part in parts for name in part.encoders}))

    def without(self, component: str) -> Family:
        """The family of a folder that has no such component, which must be an optional one."""
        if component not in self.optional:
            raise ErasecError(f"{self.name} cannot do without {component}", why=f"optional: {self.optional or 'none'}")
        streams = tuple(
            replace(stream, parts=tuple(part for part in stream.parts if component not in part.encoders))
            for stream in self.streams
        )
        return replace(self, components=tuple(name for name in self.components if name != component), streams=streams)


# By denoiser: the modules of attention and, of each, the matrices, with what they attend to and what they make of it.
# The second attention of a Stable Diffusion 3.5 block is one of the image with itself, whatever its name.
SELF = {"to_q": ("self", "q"), "to_k": ("self", "k"), "to_v": ("self", "v"), "to_out": ("self", "out")}
CROSS = {"to_q": ("cross", "q"), "to_k": ("cross", "k"), "to_v": ("cross", "v"), "to_out": ("cross", "out")}
JOINT = {"to_q": ("joint", "q"), "to_k": ("joint", "k"), "to_v": ("joint", "v"), "to_out": ("joint", "out"),
         "add_q_proj": ("context", "q"), "add_k_proj": ("context", "k"), "add_v_proj": ("context", "v"),
         "to_add_out": ("context", "out")}  # fmt: skip
ATTENTIONS = {"unet": {"attn1": SELF, "attn2": CROSS}, "transformer": {"attn": JOINT, "attn2": SELF}}
# Of a CLIP text encoder, by module.
TEXT = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out", "fc1": "mlp", "fc2": "mlp"}
# The matrices through which all text enters a transformer, with what they embed.
CONTEXT, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"
EMBEDDINGS = {CONTEXT: "context", POOLED: "pooled"}

PAIR = ONE, TWO = "text_encoder", "text_encoder_2"
THREE = "text_encoder_3"
KV, EMBED = ("k", "v"), ("embed",)
# What the keys and values of text (add_k_proj, add_v_proj) read in sd3 and flux depends on the timestep, the image and
# the blocks before, so no fixed map of text states can be put into them. It can be put before them, into
# context_embedder, through which all of them read; and into the projection of the pooled state, which sets every norm.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # The text encoder of SD 2's folder ends one layer early, so its last state is the penultimate of OpenCLIP.
        Family("sd1", (ONE, "unet", "vae"), (Stream("context", (Part((ONE,)),), "cross", KV),)),
        Family("sd2", (ONE, "unet", "vae"), (Stream("context", (Part((ONE,)),), "cross", KV),)),
        Family("sdxl", (*PAIR, "unet", "vae"), (Stream("context", (Part(PAIR, "penultimate"),), "cross", KV),)),
        # CLIP's rows first, both encoders side by side; then T5's.
        Family("sd3", (*PAIR, THREE, "transformer", "vae"), (
            Stream("context", (Part(PAIR, "penultimate", padded=True), Part((THREE,), length=256)), "context", EMBED),
            Stream("pooled", (Part(PAIR, "pooled"),), "pooled", EMBED),
        ), "transformer", (THREE,)),
        Family("flux", (*PAIR, "transformer", "vae"), (
            Stream("context", (Part((TWO,), length=512),), "context", EMBED),
            Stream("pooled", (Part((ONE,), "pooled"),), "pooled", EMBED),
        ), "transformer"),
    )
}  # fmt: skip


def detect(denoiser: Mapping[str, Shape]) -> Family:
    """Tell the family from the denoiser's tensors.

    Of UNets with cross-attention, SDXL embeds sizes, SD 2 projects linearly, SD 1 by convolution. Of transformers with
    joint attention and a pooled text state, Flux has single blocks, SD 3 cuts the latents into patches by convolution.
    Raises ErasecError for anything else: a guess here would edit the wrong matrices.
    """
    entry = next((shape for key, shape in denoiser.items() if key.endswith("attentions.0.proj_in.weight")), None)
    has_context = any(key.endswith("attn2.to_k.weight") for key in denoiser)
    if entry is not None and has_context and "conv_in.weight" in denoiser:
        if "add_embedding.linear_1.weight" in denoiser:
            return FAMILIES["sdxl"]
        return FAMILIES["sd1" if len(entry) == 4 else "sd2"]
    # A ControlNet has all of these but the last.
    joint = (CONTEXT, POOLED, "transformer_blocks.0.attn.add_k_proj.weight", "proj_out.weight")
    if all(len(denoiser.get(key, ())) == 2 for key in joint):
        single = any(key.startswith("single_transformer_blocks.") for key in denoiser)
        if single and len(denoiser.get("x_embedder.weight", ())) == 2:
            return FAMILIES["flux"]
        if not single and len(denoiser.get("pos_embed.proj.weight", ())) == 4:
            return FAMILIES["sd3"]
    seen = ", ".join(f"{key} {shape}" for key, shape in sorted(denoiser.items())[:3])
    raise ErasecError(
        "this denoiser belongs to no family that erasec knows",
        why=f"it has {len(denoiser)} tensors ({seen}, ...); known: {', '.join(FAMILIES)}",
        fix="a family is one row in compiler/family.py and a rule in detect(); there is no switch to go on regardless",
    )


def parameters(component: str, tensors: Mapping[str, Shape], denoiser: str) -> tuple[Site, ...]:
    """Every tensor of a component as a Site, biases and convolutions too, in the order of their keys.

    Those that ``sites`` finds in the denoiser are the very same; a bias has the attention and projection of its matrix.
    """
    known = {site.key: site for site in sites(component, tensors)} if component == denoiser else {}
    found = []
    for key, shape in sorted(tensors.items()):
        matrix = known.get(key.removesuffix(".bias") + ".weight") if key.endswith(".bias") else None
        if key in known:
            found.append(known[key])
        elif matrix is not None:
            found.append(replace(matrix, key=key, shape=shape))
        else:
            parts = key.removeprefix("text_model.").split(".")
            block = ".".join(parts[:-2]).replace("_blocks", "") or parts[0]
            found.append(
                Site(component, key, shape, "other", "", block)
                if component == denoiser
                else Site(component, key, shape, "text", TEXT.get(parts[-2], ""), f"{component} {block}")
            )
    return tuple(found)


def sites(component: str, tensors: Mapping[str, Shape]) -> tuple[Site, ...]:
    """Every attention projection and text embedding of a denoiser, in the order of their keys."""
    found = []
    attentions = ATTENTIONS[component]
    for key, shape in sorted(tensors.items()):
        if len(shape) != 2 or not key.endswith(".weight"):
            continue
        parts = key.split(".")
        module = next((part for part in parts if part in attentions), "")
        proj = next((part for part in parts if part in attentions.get(module, ())), "")
        if key in EMBEDDINGS:
            found.append(Site(component, key, shape, EMBEDDINGS[key], "embed", key.removesuffix(".weight")))
        elif proj:
            block = ".".join(parts[: parts.index(module)]).replace(".transformer_blocks", "").replace("_blocks", "")
            found.append(Site(component, key, shape, *attentions[module][proj], block))
    return tuple(found)
