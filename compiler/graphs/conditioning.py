"""What denoisers read besides latents and a timestep: text states of all encoders, and what describes the picture.

Arrays are by the names of the inputs of the denoiser's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.folder import downscale
from erasec.graphs.signature import HIDDEN, T5_TOKENS, TEXT_STATES

if TYPE_CHECKING:
    from erasec.graphs.signature import Configs

Array = NDArray[Any]
Arrays = dict[str, Array]
# Runs one text encoder, by its name, on the prompts: its outputs by name.
Encode = Callable[[str], Mapping[str, Array]]


def text_inputs(layout: str, configs: Configs, encode: Encode) -> Arrays:
    """The inputs of a denoiser that depend on the prompts alone: text states (n, t, d), and pooled ones (n, d).

    ``layout`` is one of ``signature.LAYOUTS``, and ``configs`` are those of its components. Text states are those of
    diffusers' pipelines: in Stable Diffusion XL and 3 the penultimate ones of the CLIP encoders, side by side.
    """
    first = encode("text_encoder")
    if layout == "sd":
        return {TEXT_STATES: first["last_hidden_state"]}
    second = encode("text_encoder_2")
    if layout == "flux":
        return {TEXT_STATES: second["last_hidden_state"], "pooled_projections": first["pooler_output"]}
    states = np.concatenate([_penultimate(first), _penultimate(second)], 2)
    if layout == "sdxl":
        return {TEXT_STATES: states, "text_embeds": second["text_embeds"]}
    width = configs["transformer"]["joint_attention_dim"]
    states = np.pad(states, ((0, 0), (0, 0), (0, width - states.shape[2])))
    if "text_encoder_3" in configs:
        last = encode("text_encoder_3")["last_hidden_state"]
    else:  # pipelines give zeros in the place of the rows of a T5 that a folder lacks
        last = np.zeros((len(states), T5_TOKENS["sd3"], width), np.float32)
    pooled = np.concatenate([first["text_embeds"], second["text_embeds"]], 1)
    return {TEXT_STATES: np.concatenate([states, last], 1), "pooled_projections": pooled}


def _penultimate(outputs: Mapping[str, Array]) -> Array:
    """The states before the last layer of a CLIP encoder."""
    numbers = [int(name.removeprefix(HIDDEN)) for name in outputs if name.startswith(HIDDEN)]
    return outputs[f"{HIDDEN}{max(numbers) - 1}"]


def picture_inputs(
    layout: str, configs: Configs, size: tuple[int, int, int], tokens: int, guidance: float = 1.0
) -> Arrays:
    """The inputs of a denoiser that describe the picture, for latents of ``size`` (batch, height, width).

    Stable Diffusion XL reads the size of the picture before and after a crop, and its corner: here there is no crop
    (Podell et al., 2023, section 2.2). FLUX reads the places of its ``tokens`` text states and of its patches, and the
    ``guidance`` that it was distilled for.
    """
    batch, height, width = size
    if layout == "sdxl":
        pixels = [float(side * downscale(configs["vae"])) for side in (height, width)]
        return {"time_ids": np.tile(np.array([*pixels, 0.0, 0.0, *pixels], np.float32), (batch, 1))}
    if layout == "flux":
        rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
        places = np.stack([np.zeros_like(rows), rows, columns], 2).reshape(-1, 3).astype(np.float32)
        inputs: Arrays = {"txt_ids": np.zeros((tokens, 3), np.float32), "img_ids": places}
        if configs["transformer"].get("guidance_embeds"):
            inputs["guidance"] = np.full(batch, guidance, np.float32)
        return inputs
    return {}


def without_prompt(inputs: Arrays, index: Mapping[str, Any]) -> Arrays:
    """The ``inputs`` of the empty prompt, or zeros where model_index.json, ``index``, says that the pipeline of Stable
    Diffusion XL reads zeros without a negative prompt."""
    if index.get("force_zeros_for_empty_prompt", True):
        return {name: np.zeros_like(value) for name, value in inputs.items()}
    return inputs


def pack(latents: Array) -> Array:
    """Latents (n, c, h, w) as FLUX reads them: patches of 2 x 2, (n, h/2 * w/2, 4c)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(patches.reshape(batch, -1, 4 * channels))


def unpack(patches: Array, height: int, width: int) -> Array:
    """Latents (n, c, h, w) of patches (n, h/2 * w/2, 4c): the inverse of ``pack``."""
    grid = patches.reshape(len(patches), height // 2, width // 2, -1, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(grid.reshape(len(patches), -1, height, width))


def denoiser_inputs(layout: str, latents: Array, timestep: float) -> Arrays:
    """The latents (n, c, h, w) and the timestep, as the denoiser's graph reads them."""
    if layout in ("sd", "sdxl"):
        return {"sample": latents, "timestep": np.array(timestep, np.float32)}
    if layout == "flux":  # which counts time from 0 to 1
        return {"hidden_states": pack(latents), "timestep": np.full(len(latents), timestep / 1000, np.float32)}
    return {"hidden_states": latents, "timestep": np.full(len(latents), timestep, np.float32)}


def prediction(layout: str, outputs: Mapping[str, Array], height: int, width: int) -> Array:
    """What a denoiser's outputs predict for latents of this size: (n, c, h, w)."""
    output = outputs["out_sample" if layout in ("sd", "sdxl") else "out_hidden_states"]
    return unpack(output, height, width) if layout == "flux" else output
