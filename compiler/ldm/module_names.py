"""Names of the modules of denoisers, VAEs and text encoders, in diffusers folders and in original single files (LDM).

Both layouts contain the same modules. Their number is read from the tensor names of the given side, so that models with
other numbers of blocks are supported as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from erasec.errors import ErasecError
from erasec.family import FAMILIES, SingleFileLayout

VIT_H_LAYERS = 24  # OpenCLIP's ViT-H, the text encoder of Stable Diffusion 2

# In each table: the name in diffusers (or transformers), and the original name.
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
SIZE_EMBEDDING = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_ENDS = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# Modules that have the same name in both layouts.
TRANSFORMER_BLOCK = (
    "norm1",
    "norm2",
    "norm3",
    "ff.net.0.proj",
    "ff.net.2",
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
)
CLIP_LAYER = (*OPENCLIP_LAYER, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# OpenCLIP and transformers store these projections of a layer as one tensor, in this order.
THIRDS = ("q", "k", "v")
# The forms of tensors that are rows of a joint tensor: their first row and their rows, of how many in all, in shares.
# A single block of FLUX has an MLP four times as wide as its queries.
SHARES = {
    **{third: (number, 1, 3) for number, third in enumerate(THIRDS)},
    "q of 7": (0, 1, 7),
    "k of 7": (1, 1, 7),
    "v of 7": (2, 1, 7),
    "mlp of 7": (3, 4, 7),
}
FORMS = (*SHARES, "linear", "transposed", "swapped", "")

# T5's tensors, which have the same names in both layouts; {} stands for the number of a block.
T5_TENSORS = ("shared.weight", "encoder.final_layer_norm.weight")
T5_BLOCK = (
    *(f"layer.0.SelfAttention.{name}.weight" for name in ("q", "k", "v", "o", "relative_attention_bias")),
    *(f"layer.1.DenseReluDense.{name}.weight" for name in ("wi", "wi_0", "wi_1", "wo")),
    *(f"layer.{number}.layer_norm.weight" for number in (0, 1)),
)


class Pair(NamedTuple):
    """The names of one tensor in a diffusers folder and in a single file, both without prefixes.

    ``form`` says how the file stores it, one of FORMS: as a share of the rows of a joint tensor ("q", "k", "v", and
    those of SHARES); as a 1x1 convolution ("linear"); "transposed"; with its first and second half of rows "swapped";
    or "", as it is.
    """

    folder: str
    file: str
    form: str = ""


class Level(NamedTuple):
    """The blocks of one resolution: the number of resnets, the number of transformer blocks of each attention, and
    whether the level ends with a down- or upsampler."""

    resnets: int
    depths: tuple[int, ...]
    sampler: bool


def tensor_pairs(family: str, component: str, names: Iterable[str], single: bool) -> Iterator[Pair]:
    """The tensor names that a component may have, in both layouts.

    ``names`` are the component's tensor names: those of a single file without their prefix if ``single``, else those of
    a folder. Raises ErasecError if the numbers of blocks have a gap, or if an SD 2 text encoder has the last layer,
    which readers of single files drop.
    """
    names = set(names)
    layout, projected = _layouts(family)
    if layout.modules and component == FAMILIES[family].denoiser:
        return _transformer(layout, names, single)
    if component in layout.t5:
        return _t5(count(names, "encoder.block."))
    if component == "unet":
        modules = _unet(*(_levels_of_file(names) if single else _levels_of_folder(names)), _middle_depth(names, single))
        if layout.size_embedding:
            modules = chain(modules, _rename("", "", SIZE_EMBEDDING))
        return _leaves(modules)
    if component == "vae":
        sides = ("encoder.down", "decoder.up") if single else ("encoder.down_blocks", "decoder.up_blocks")
        inner = "block" if single else "resnets"
        down, up = (
            [count(names, f"{side}.{level}.{inner}.") for level in range(count(names, f"{side}."))] for side in sides
        )
        return _leaves(_vae(down, up[::-1] if single else up))
    if component in layout.openclip:
        layers = count(names, "transformer.resblocks." if single else "text_model.encoder.layers.")
        if layout.drops_last_layer and not single and layers >= VIT_H_LAYERS:
            raise ErasecError(
                f"this {component} has {layers} layers",
                why=f"readers of SD 2 files drop layer {VIT_H_LAYERS}",
                fix=f"give a folder whose text encoder has {VIT_H_LAYERS - 1} layers, as the published ones have",
            )
        return _openclip(layers, projection=component in projected)
    projection = (Pair("text_projection.weight", "text_projection.weight"),) if component in projected else ()
    return chain(_leaves(_clip(count(names, "text_model.encoder.layers."))), projection)


def _layouts(family: str) -> tuple[SingleFileLayout, tuple[str, ...]]:
    """A family's single-file layout, and the text encoders whose projection a single file holds."""
    single_file, configs = FAMILIES[family].single_file, FAMILIES[family].configs or FAMILIES[family].joint_configs
    assert single_file is not None and configs is not None  # the callers have checked this
    return single_file, tuple(name for name in configs.projected if name not in single_file.unprojected)


def _transformer(layout: SingleFileLayout, names: set[str], single: bool) -> Iterator[Pair]:
    """The tensors of a transformer, as the family file names them."""
    modules = {name: (file, "") if isinstance(file, str) else file for name, file in layout.modules.items()}
    pairs = [Pair(folder, file, form) for folder, (file, form) in modules.items()]
    # A pair of the last block comes after those of all blocks, and takes the place of one of them.
    numbered = {pair.folder: pair for pair in _numbered(pairs, names, single)}
    yield from _leaves(numbered.values())
    yield from _numbered([Pair(folder, file) for folder, file in layout.tensors.items()], names, single)


def _numbered(pairs: Iterable[Pair], names: set[str], single: bool) -> Iterator[Pair]:
    """The pairs with the numbers of all blocks in place of "{}", and with that of the last one in place of "{last}"."""
    for pair in pairs:
        mark = next((mark for mark in ("{}", "{last}") if mark in pair.folder), "")
        blocks = count(names, (pair.file if single else pair.folder).split(mark)[0]) if mark else 1
        for number in range(max(0, blocks - 1) if mark == "{last}" else 0, blocks):
            folder, file = (name.replace(mark, str(number)) if mark else name for name in (pair.folder, pair.file))
            yield Pair(folder, file, pair.form)


def _t5(blocks: int) -> Iterator[Pair]:
    parts = (f"encoder.block.{block}.{part}" for block in range(blocks) for part in T5_BLOCK)
    yield from (Pair(name, name) for name in (*T5_TENSORS, *parts))


def count(names: Iterable[str], stem: str) -> int:
    """How many numbered modules follow ``stem``. Raises ErasecError if a number is missing."""
    numbers = {name.removeprefix(stem).split(".")[0] for name in names if name.startswith(stem)}
    if numbers != {str(number) for number in range(len(numbers))}:
        raise ErasecError(
            f"the numbers below {stem} have a gap: {', '.join(sorted(numbers))}",
            why="a part of the model is missing or its name is damaged",
            fix="fetch the file again",
        )
    return len(numbers)


def _levels_of_folder(names: set[str]) -> tuple[list[Level], list[Level]]:
    def levels(side: str, sampler: str) -> list[Level]:
        result = []
        for number in range(count(names, f"{side}.")):
            block = f"{side}.{number}"
            depths = tuple(
                count(names, f"{block}.attentions.{index}.transformer_blocks.")
                for index in range(count(names, f"{block}.attentions."))
            )
            has_sampler = any(name.startswith(f"{block}.{sampler}.") for name in names)
            result.append(Level(count(names, f"{block}.resnets."), depths, has_sampler))
        return result

    return levels("down_blocks", "downsamplers"), levels("up_blocks", "upsamplers")


def _levels_of_file(names: set[str]) -> tuple[list[Level], list[Level]]:
    """The levels of a single file, which numbers blocks without levels. A level ends with its sampler: a downsampler is
    a block of its own, an upsampler is a part of the level's last block."""

    def levels(side: str, first: int) -> list[Level]:
        result, resnets, depths = [], 0, list[int]()
        for number in range(first, count(names, f"{side}.")):
            block = f"{side}.{number}."
            inside = [name.removeprefix(block) for name in names if name.startswith(block)]
            down = any(name.startswith("0.op.") for name in inside)
            up = any(name.startswith(("1.conv.", "2.conv.")) for name in inside)
            resnets += not down
            if any(name.startswith("1.") and not name.startswith("1.conv.") for name in inside):
                depths.append(count(inside, "1.transformer_blocks."))
            if down or up:
                result.append(Level(resnets, tuple(depths), True))
                resnets, depths = 0, []
        return [*result, Level(resnets, tuple(depths), False)] if resnets else result

    return levels("input_blocks", 1), levels("output_blocks", 0)


def _middle_depth(names: set[str], single: bool) -> int:
    stem = "middle_block.1.transformer_blocks." if single else "mid_block.attentions.0.transformer_blocks."
    return count(names, stem)


def _unet(down: list[Level], up: list[Level], middle: int) -> Iterator[Pair]:
    yield from _rename("", "", UNET_ENDS)
    number = 1
    for level, (resnets, depths, sampler) in enumerate(down):
        folder = f"down_blocks.{level}."
        for index in range(resnets):
            yield from _rename(f"{folder}resnets.{index}.", f"input_blocks.{number}.0.", UNET_RESNET)
            if index < len(depths):
                yield from _attention(f"{folder}attentions.{index}.", f"input_blocks.{number}.1.", depths[index])
            number += 1
        if sampler:
            yield Pair(f"{folder}downsamplers.0.conv", f"input_blocks.{number}.0.op")
            number += 1
    yield from _rename("mid_block.resnets.0.", "middle_block.0.", UNET_RESNET)
    yield from _attention("mid_block.attentions.0.", "middle_block.1.", middle)
    yield from _rename("mid_block.resnets.1.", "middle_block.2.", UNET_RESNET)
    number = 0
    for level, (resnets, depths, sampler) in enumerate(up):
        folder = f"up_blocks.{level}."
        for index in range(resnets):
            yield from _rename(f"{folder}resnets.{index}.", f"output_blocks.{number}.0.", UNET_RESNET)
            if index < len(depths):
                yield from _attention(f"{folder}attentions.{index}.", f"output_blocks.{number}.1.", depths[index])
            number += 1
        if sampler:
            yield Pair(f"{folder}upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if depths else 1}.conv")


def _attention(folder: str, file: str, depth: int) -> Iterator[Pair]:
    blocks = (f"transformer_blocks.{block}.{part}" for block in range(depth) for part in TRANSFORMER_BLOCK)
    for part in ("norm", "proj_in", "proj_out", *blocks):
        yield Pair(folder + part, file + part)


def _vae(down: list[int], up: list[int]) -> Iterator[Pair]:
    yield from (Pair("quant_conv", "quant_conv"), Pair("post_quant_conv", "post_quant_conv"))
    for side, sampler, levels in (("down", "downsample", down), ("up", "upsample", up)):
        coder = "encoder" if side == "down" else "decoder"
        for level, resnets in enumerate(levels):
            # The original layout numbers the decoder's levels from the image, diffusers numbers them from the latents.
            number = level if side == "down" else len(levels) - 1 - level
            folder, file = f"{coder}.{side}_blocks.{level}.", f"{coder}.{side}.{number}."
            for index in range(resnets):
                yield from _rename(f"{folder}resnets.{index}.", f"{file}block.{index}.", VAE_RESNET)
            yield Pair(f"{folder}{sampler}rs.0.conv", f"{file}{sampler}.conv")
        for end, name in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield Pair(f"{coder}.{end}", f"{coder}.{name}")
        for index in range(2):
            yield from _rename(f"{coder}.mid_block.resnets.{index}.", f"{coder}.mid.block_{index + 1}.", VAE_RESNET)
        for pair in _rename(f"{coder}.mid_block.attentions.0.", f"{coder}.mid.attn_1.", VAE_ATTENTION):
            yield pair._replace(form="linear")


def _clip(layers: int) -> Iterator[Pair]:
    parts = [f"encoder.layers.{layer}.{part}" for layer in range(layers) for part in CLIP_LAYER]
    for part in ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm", *parts):
        yield Pair(f"text_model.{part}", f"text_model.{part}")


def _openclip(layers: int, projection: bool) -> Iterator[Pair]:
    if projection:
        yield Pair("text_projection.weight", "text_projection", "transposed")
    yield Pair("text_model.embeddings.position_embedding.weight", "positional_embedding")
    modules = list(_rename("text_model.", "", OPENCLIP_ENDS))
    for layer in range(layers):
        folder, file = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        modules += _rename(folder, file, OPENCLIP_LAYER)
        for third in THIRDS:
            for leaf in ("weight", "bias"):
                yield Pair(f"{folder}self_attn.{third}_proj.{leaf}", f"{file}attn.in_proj_{leaf}", third)
    yield from _leaves(modules)


def _rename(folder: str, file: str, parts: Mapping[str, str]) -> Iterator[Pair]:
    yield from (Pair(folder + part, file + name) for part, name in parts.items())


def _leaves(modules: Iterable[Pair]) -> Iterator[Pair]:
    """The weight and bias of each module."""
    for folder, file, form in modules:
        for leaf in ("weight", "bias"):
            yield Pair(f"{folder}.{leaf}", f"{file}.{leaf}", form)
