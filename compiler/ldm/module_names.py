"""The modules of UNets, VAEs and text encoders by both their names: diffusers' (or transformers'), and the original.

Both layouts hold the same modules; how many there are is read off the names of the side that is given, so models of
fewer or narrower blocks have their names too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from erasec.errors import ErasecError

OPENCLIP = (("sd2", "text_encoder"), ("sdxl", "text_encoder_2"))
VIT_H_LAYERS = 24

# diffusers' name of a module, and the original one
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
SIZE_EMBEDDING = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_ENDS = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
OPENCLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
                  "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
# modules whose names are the same on both sides
TRANSFORMER_BLOCK = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2",
                     "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
                     "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")  # fmt: skip
CLIP_LAYER = (*OPENCLIP_LAYER, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
THIRDS = ("q", "k", "v")


class Pair(NamedTuple):
    """A key of a folder and of a file, without their prefixes; ``form`` is a name of THIRDS, "linear", "transposed"."""

    ours: str
    theirs: str
    form: str = ""


class Level(NamedTuple):
    """Blocks of one resolution: resnets, transformer blocks of each attention, and whether a sampler ends it."""

    resnets: int
    depths: tuple[int, ...]
    sampler: bool


def pairs(family: str, component: str, names: Iterable[str], single: bool) -> Iterator[Pair]:
    """Every key that a component of this structure may have, on both sides.

    ``names`` are the keys of one side, ``single`` says which; both are without the prefixes of a single file. Raises
    ErasecError where numbered blocks have a gap, and for an SD 2 text encoder that keeps the layer which files lose.
    """
    names = set(names)
    if component == "unet":
        modules = _unet(*(_levels_of_file(names) if single else _levels_of_folder(names)), _middle(names, single))
        if family == "sdxl":
            modules = chain(modules, _renamed("", "", SIZE_EMBEDDING))
        return _leaves(modules)
    if component == "vae":
        sides = ("encoder.down", "decoder.up") if single else ("encoder.down_blocks", "decoder.up_blocks")
        inner = "block" if single else "resnets"
        down, up = (
            [count(names, f"{side}.{level}.{inner}.") for level in range(count(names, f"{side}."))] for side in sides
        )
        return _leaves(_vae(down, up[::-1] if single else up))
    if (family, component) in OPENCLIP:
        layers = count(names, "transformer.resblocks." if single else "text_model.encoder.layers.")
        if family == "sd2" and not single and layers >= VIT_H_LAYERS:
            raise ErasecError(
                f"this {component} has {layers} layers", why=f"readers of SD 2 files use all but layer {VIT_H_LAYERS}",
                fix="give a folder whose text encoder ends with the layer before the last, as SD 2's own does",
            )  # fmt: skip
        return _openclip(layers, projection=family == "sdxl")
    layers = count(names, "text_model.encoder.layers.")
    return _leaves(_clip(layers))


def count(names: Iterable[str], stem: str) -> int:
    """How many numbered modules lie below ``stem``. Raises ErasecError where a number is left out."""
    found = {name.removeprefix(stem).split(".")[0] for name in names if name.startswith(stem)}
    if found != {str(number) for number in range(len(found))}:
        raise ErasecError(
            f"the numbers below {stem} have a gap: {', '.join(sorted(found))}",
            why="a part of the model is missing or its name is damaged", fix="fetch the file again",
        )  # fmt: skip
    return len(found)


def _levels_of_folder(names: set[str]) -> tuple[list[Level], list[Level]]:
    def levels(side: str, sampler: str) -> list[Level]:
        found = []
        for number in range(count(names, f"{side}.")):
            block = f"{side}.{number}"
            depths = tuple(
                count(names, f"{block}.attentions.{index}.transformer_blocks.")
                for index in range(count(names, f"{block}.attentions."))
            )
            sampled = any(name.startswith(f"{block}.{sampler}.") for name in names)
            found.append(Level(count(names, f"{block}.resnets."), depths, sampled))
        return found

    return levels("down_blocks", "downsamplers"), levels("up_blocks", "upsamplers")


def _levels_of_file(names: set[str]) -> tuple[list[Level], list[Level]]:
    """A level ends with its sampler: a block of its own on the way down, a part of the last block on the way up."""

    def levels(side: str, first: int) -> list[Level]:
        found, resnets, depths = [], 0, list[int]()
        for number in range(first, count(names, f"{side}.")):
            block = f"{side}.{number}."
            inside = [name.removeprefix(block) for name in names if name.startswith(block)]
            down = any(name.startswith("0.op.") for name in inside)
            up = any(name.startswith(("1.conv.", "2.conv.")) for name in inside)
            resnets += not down
            if any(name.startswith("1.") and not name.startswith("1.conv.") for name in inside):
                depths.append(count(inside, "1.transformer_blocks."))
            if down or up:
                found.append(Level(resnets, tuple(depths), True))
                resnets, depths = 0, []
        return [*found, Level(resnets, tuple(depths), False)] if resnets else found

    return levels("input_blocks", 1), levels("output_blocks", 0)


def _middle(names: set[str], single: bool) -> int:
    stem = "middle_block.1.transformer_blocks." if single else "mid_block.attentions.0.transformer_blocks."
    return count(names, stem)


def _unet(down: list[Level], up: list[Level], middle: int) -> Iterator[Pair]:
    yield from _renamed("", "", UNET_ENDS)
    number = 1
    for level, (resnets, depths, sampler) in enumerate(down):
        ours = f"down_blocks.{level}."
        for index in range(resnets):
            yield from _renamed(f"{ours}resnets.{index}.", f"input_blocks.{number}.0.", UNET_RESNET)
            if index < len(depths):
                yield from _attention(f"{ours}attentions.{index}.", f"input_blocks.{number}.1.", depths[index])
            number += 1
        if sampler:
            yield Pair(f"{ours}downsamplers.0.conv", f"input_blocks.{number}.0.op")
            number += 1
    yield from _renamed("mid_block.resnets.0.", "middle_block.0.", UNET_RESNET)
    yield from _attention("mid_block.attentions.0.", "middle_block.1.", middle)
    yield from _renamed("mid_block.resnets.1.", "middle_block.2.", UNET_RESNET)
    number = 0
    for level, (resnets, depths, sampler) in enumerate(up):
        ours = f"up_blocks.{level}."
        for index in range(resnets):
            yield from _renamed(f"{ours}resnets.{index}.", f"output_blocks.{number}.0.", UNET_RESNET)
            if index < len(depths):
                yield from _attention(f"{ours}attentions.{index}.", f"output_blocks.{number}.1.", depths[index])
            number += 1
        if sampler:
            yield Pair(f"{ours}upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if depths else 1}.conv")


def _attention(ours: str, theirs: str, depth: int) -> Iterator[Pair]:
    blocks = (f"transformer_blocks.{block}.{part}" for block in range(depth) for part in TRANSFORMER_BLOCK)
    for part in ("norm", "proj_in", "proj_out", *blocks):
        yield Pair(ours + part, theirs + part)


def _vae(down: list[int], up: list[int]) -> Iterator[Pair]:
    yield from (Pair("quant_conv", "quant_conv"), Pair("post_quant_conv", "post_quant_conv"))
    for side, sampler, levels in (("down", "downsample", down), ("up", "upsample", up)):
        coder = "encoder" if side == "down" else "decoder"
        for level, resnets in enumerate(levels):
            # The original counts the decoder's levels from the image, diffusers from the latents.
            number = level if side == "down" else len(levels) - 1 - level
            ours, theirs = f"{coder}.{side}_blocks.{level}.", f"{coder}.{side}.{number}."
            for index in range(resnets):
                yield from _renamed(f"{ours}resnets.{index}.", f"{theirs}block.{index}.", VAE_RESNET)
            yield Pair(f"{ours}{sampler}rs.0.conv", f"{theirs}{sampler}.conv")
        for end, name in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield Pair(f"{coder}.{end}", f"{coder}.{name}")
        for index in range(2):
            yield from _renamed(f"{coder}.mid_block.resnets.{index}.", f"{coder}.mid.block_{index + 1}.", VAE_RESNET)
        for pair in _renamed(f"{coder}.mid_block.attentions.0.", f"{coder}.mid.attn_1.", VAE_ATTENTION):
            yield pair._replace(form="linear")


def _clip(layers: int) -> Iterator[Pair]:
    parts = [f"encoder.layers.{layer}.{part}" for layer in range(layers) for part in CLIP_LAYER]
    for part in ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm", *parts):
        yield Pair(f"text_model.{part}", f"text_model.{part}")


def _openclip(layers: int, projection: bool) -> Iterator[Pair]:
    if projection:
        yield Pair("text_projection.weight", "text_projection", "transposed")
    yield Pair("text_model.embeddings.position_embedding.weight", "positional_embedding")
    modules = list(_renamed("text_model.", "", OPENCLIP_ENDS))
    for layer in range(layers):
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        modules += _renamed(ours, theirs, OPENCLIP_LAYER)
        for third in THIRDS:
            for leaf in ("weight", "bias"):
                yield Pair(f"{ours}self_attn.{third}_proj.{leaf}", f"{theirs}attn.in_proj_{leaf}", third)
    yield from _leaves(modules)


def _renamed(ours: str, theirs: str, parts: Mapping[str, str]) -> Iterator[Pair]:
    yield from (Pair(ours + part, theirs + name) for part, name in parts.items())


def _leaves(modules: Iterable[Pair]) -> Iterator[Pair]:
    for ours, theirs, form in modules:
        for leaf in ("weight", "bias"):
            yield Pair(f"{ours}.{leaf}", f"{theirs}.{leaf}", form)
