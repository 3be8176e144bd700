"""Operations and activations of the networks of a model, counted from the shapes of their tensors. Imports no torch.

A matrix or a kernel of n numbers takes 2 n operations at every position that it is applied to, which is a pixel, a
token or, for what depends on the timestep alone, the picture. The position follows from the name of the tensor: level i
of the U has latents of 1 / 2^i the height and width. An attention takes 4 q k d operations besides, for q queries, k
keys and the width d. Norms, activations and sums are not counted: they take less than a hundredth of the operations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from erasec.checkpoint.folder import downscale, trained_size
from erasec.family import FAMILIES
from erasec.ldm.tensor_names import canonical

if TYPE_CHECKING:
    from erasec.family import Family, Shape
    from erasec.model.view import Model

# Tables whose rows are looked up: embeddings of tokens and positions, in CLIP and in T5.
LOOKED_UP = re.compile(
    r"(token_embedding|position_embedding|position_ids|embed_tokens|shared|relative_attention_bias)\b"
)
TOKENS = 77  # of a prompt, in every text encoder of CLIP


@dataclass(frozen=True)
class Cost:
    """What one row costs a network: a latent, a picture or a prompt.

    ``operations`` are those of a forward pass; a backward pass takes twice as many. ``layers`` is the number of
    matrices and kernels, each of which is a call of a library. ``saved`` is the number of values that a forward pass
    keeps for the backward pass, and ``recomputed`` the same where activations of blocks are computed again: the inputs
    of all blocks, and the values of the largest one.
    """

    operations: float
    layers: int
    saved: float
    recomputed: float


def denoiser(model: Model) -> Cost:
    """One row of the denoiser at the size that it was trained on."""
    config = model.source.config(model.family.denoiser)
    height, width = trained_size(config)
    if "patch_size" in config:
        patches = height * width // downscale(config) ** 2
        tokens, single = text_rows(FAMILIES[model.family.name]), model.family.single_stream
        return _joint(_shapes(model, model.family.denoiser), patches, tokens, single)
    depth = downscale(config).bit_length() - 1
    return _network(_shapes(model, model.family.denoiser), lambda key: _unet_scale(key, depth), height * width, TOKENS)


def text_rows(family: Family) -> int:
    """The rows of text states that the denoiser of a family reads."""
    return sum(part.length or TOKENS for part in family.streams[0].parts)


def _joint(shapes: Mapping[str, Shape], patches: int, tokens: int, single: tuple[str, ...]) -> Cost:
    """The cost of a transformer with joint attention: blocks with one stream of ``patches`` and one of ``tokens``, and
    those with the prefixes ``single``, with one stream of both."""
    operations, layers = 0.0, 0
    saved: dict[str, float] = {}  # by block
    inputs: dict[str, float] = {}
    for key, shape in shapes.items():
        if len(shape) == 1 or key.startswith("pos_embed.pos_embed"):
            continue
        positions = patches
        if re.search(r"(^time_text_embed|norm\w*\.linear)\.", key):
            positions = 1
        elif re.search(r"(^context_embedder|\.add_\w_proj|\.to_add_out|\.ff_context\.)", key):
            positions = tokens
        elif key.startswith(single):
            positions = patches + tokens
        block = _block(key)
        operations += 2 * prod(shape) * positions
        layers += 1
        kept = positions * shape[1]
        if re.search(r"\.attn2?\.(to_[qkv]|add_[qkv]_proj)\.", key):
            kept = positions * shape[0]  # their common input, a modulated norm, is counted with the queries
            if re.search(r"\.attn2?\.to_q\.", key):
                rows = patches + (0 if ".attn2." in key else tokens)
                operations += 4 * rows**2 * shape[0]
                # The norm's output before and after its modulation, and what the attention returns.
                kept += 3 * rows * shape[0]
                inputs[block] = rows * shape[1]
        elif ".net.0.proj." in key:
            kept = positions * (2 * shape[1] + 2 * shape[0])  # a modulated norm, and the activation's input and output
        saved[block] = saved.get(block, 0.0) + kept
    total = sum(saved.values())
    largest = max((size for block, size in saved.items() if block), default=0.0)
    return Cost(operations, layers, total, min(total, saved.get("", 0.0) + sum(inputs.values()) + largest))


def decoder(model: Model) -> Cost:
    """Decoding of one picture by the VAE."""
    return _vae(model, "decoder.", "post_quant_conv.")


def encoder(model: Model) -> Cost:
    """Encoding of one picture by the VAE."""
    return _vae(model, "encoder.", "quant_conv.")


def text(model: Model) -> Cost:
    """Encoding of one prompt by all text encoders."""
    costs = [_network(_shapes(model, name), lambda key: 1.0, TOKENS, TOKENS) for name in model.family.text_encoders]
    operations, layers = sum(cost.operations for cost in costs), sum(cost.layers for cost in costs)
    return Cost(operations, layers, sum(cost.saved for cost in costs), sum(cost.recomputed for cost in costs))


def _vae(model: Model, *parts: str) -> Cost:
    config = model.source.config("vae")
    height, width = trained_size(model.source.config(model.family.denoiser))
    depth = downscale(config).bit_length() - 1
    shapes = {key: shape for key, shape in _shapes(model, "vae").items() if key.startswith(parts)}
    return _network(shapes, lambda key: _vae_scale(key, depth), height * width, TOKENS)


def _shapes(model: Model, component: str) -> dict[str, Shape]:
    return {canonical(component, key): entry.shape for key, entry in model.entries(component).items()}


def _unet_scale(key: str, depth: int) -> float:
    """The positions of a tensor of a UNet, relative to the pixels of the latents; 0 for one of the timestep alone.

    ``depth`` is the number of the lowest level.
    """
    if re.match(r"(time_embedding|add_embedding|class_embedding)\.", key) or ".time_emb_proj." in key:
        return 0.0
    if key.startswith("mid_block."):
        return 4.0**-depth
    block = re.match(r"(down|up)_blocks\.(\d+)\.", key)
    if block is None:
        return 1.0
    level = int(block[2]) if block[1] == "down" else depth - int(block[2])
    return 4.0 ** -(level + (".downsamplers." in key) - (".upsamplers." in key))


def _vae_scale(key: str, depth: int) -> float:
    """The positions of a tensor of a VAE, relative to the pixels of the latents."""
    block = re.match(r"(encoder|decoder)\.(?:(down|up)_blocks\.(\d+)\.|(conv_in|conv_out|conv_norm_out)\.)", key)
    if block is None:  # in the middle, and between VAE and UNet
        return 1.0
    if block[4]:
        at_pixels = (block[1] == "encoder") == (block[4] == "conv_in")
        return 4.0**depth if at_pixels else 1.0
    if block[2] == "down":
        return 4.0 ** (depth - int(block[3]) - (".downsamplers." in key))
    return 4.0 ** (int(block[3]) + (".upsamplers." in key))


def _network(shapes: Mapping[str, Shape], scale: Callable[[str], float], pixels: int, tokens: int) -> Cost:
    """The cost of a network with these tensors; ``scale`` gives the positions of a tensor relative to ``pixels``."""
    operations, layers = 0.0, 0
    saved: dict[str, float] = {}  # by block
    inputs: dict[str, float] = {}
    for key, shape in shapes.items():
        positions = pixels * scale(key)
        cross = bool(re.search(r"\.attn2\.(to_k|to_v)\.", key))
        positions = tokens if cross else positions or 1.0
        block, kept = _block(key), 0.0
        if len(shape) == 1:
            if key.endswith(".weight"):  # of a norm: its input, and the input of the activation after it
                kept = positions * shape[0] * (2 if _before_activation(key) else 1)
        elif LOOKED_UP.search(key):
            continue
        else:
            operations += 2 * prod(shape) * positions
            layers += 1
            # A kernel's input has four times as many positions below, and a quarter above.
            at_input = 4.0 if ".downsamplers." in key else 1.0
            kept = positions * at_input * shape[1]
            if projection := re.search(
                r"\b(?:attn\d|self_attn|attentions\.0)\.(to_q|q_proj|to_k|k_proj|to_v|v_proj)\.", key
            ):
                kept = positions * shape[0]  # queries, keys and values; their common input is that of a norm's output
                if projection[1] in ("to_q", "q_proj"):
                    keys = tokens if ".attn2." in key else positions
                    operations += 4 * positions * keys * shape[0]
                    kept += positions * shape[1]
            elif ".ff.net.0.proj." in key:
                kept += positions * shape[0] * 1.5  # both halves, and the activation of one
            elif re.search(r"\.mlp\.fc1\.", key):
                kept += positions * shape[0] * 2  # the activation of CLIP is a product with a sigmoid
        saved[block] = saved.get(block, 0.0) + kept
        inputs[block] = max(inputs.get(block, 0.0), positions * shape[-1 if len(shape) == 1 else 1])
    total = sum(saved.values())
    outside = saved.get("", 0.0)
    recomputed = outside + sum(size for block, size in inputs.items() if block)
    largest = max((size for block, size in saved.items() if block), default=0.0)
    return Cost(operations, layers, total, min(total, recomputed + largest))


def _block(key: str) -> str:
    """The block that is computed again as a whole: a residual block or a transformer block; "" outside these."""
    block = re.match(r".*?(resnets\.\d+|transformer_blocks\.\d+|encoder\.layers\.\d+)\.", key)
    return block[0] if block else ""


def _before_activation(key: str) -> bool:
    return ".resnets." in key or "conv_norm_out." in key
