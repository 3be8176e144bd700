"""Diffusers folders with random weights in a family's exact layout: for tests and benchmarks of formats and scale."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erasec.checkpoint.safetensors import read_header, stream_tensors
from erasec.errors import ErasecError, suggestion
from erasec.family import FAMILIES, Shape
from erasec.glyphs.recipe import SIZES
from erasec.glyphs.world import sample
from erasec.ldm import configs, skeleton, tensor_names
from erasec.worlds import assemble, networks

# The graphs of Stable Diffusion 1 and 2 that make a picture of a prompt.
TEXT_TO_IMAGE = ("text_encoder", "unet", "vae_decoder")
GRAPHS = (*TEXT_TO_IMAGE, "vae_encoder")
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# A constant tensor that the published folders of Stable Diffusion 1 and 2 contain.
POSITION_IDS = "text_model.embeddings.position_ids"


def random_folder(
    out: Path, family: str, size: str = "tiny", seed: int = 0, dtype: str = "float32", shards: int = 1
) -> None:
    """Write a whole diffusers folder with random weights: the same arguments give the same bytes.

    ``size`` is "full", the published model's shapes and keys, or "tiny", the same kinds of blocks at reduced width.
    ``shards`` is the number of files of the UNet. Matrices and convolutions are normal with variance 1 / fan-in, norms
    near the identity. Memory: one tensor at a time.
    """
    tensors = random_shapes(family, size)
    if dtype not in FLOATS:
        raise ErasecError(f"weights are not written as {dtype}", why=suggestion(dtype, FLOATS))
    if seed < 0 or not 1 <= shards <= len(tensors["unet"]):
        raise ErasecError(
            f"seed {seed} and {shards} shards make no folder",
            why=f"seeds start at 0, and the UNet's {len(tensors['unet'])} tensors fill 1 to as many shards",
        )
    skeleton.write_skeleton(out, family, tensors)
    for component, shapes in tensors.items():
        stem = "model" if component in FAMILIES[family].text_encoders else "diffusion_pytorch_model"
        keys, count = sorted(shapes), shards if component == "unet" else 1
        where: dict[str, str] = {}
        total = 0
        for number in range(count):
            part = keys[number * len(keys) // count : (number + 1) * len(keys) // count]
            name = f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.safetensors"
            total += _write_random(out / component / name, {key: shapes[key] for key in part}, component, seed, dtype)
            where |= dict.fromkeys(part, name)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            skeleton.write_json(out / component / f"{stem}.safetensors.index.json", index)


def random_shapes(family: str, size: str) -> dict[str, dict[str, Shape]]:
    """Shapes by component and key of what ``random_folder`` writes, with the keys of the published files."""
    configs.check_known(family)
    sizes = configs.LAYOUTS[family].sizes
    if size not in sizes:
        raise ErasecError(f"there is no size {size!r}", why=suggestion(size, sizes))
    built = skeleton.shapes_of_classes(family, configs.config_files(family, sizes[size]))
    for name in FAMILIES[family].text_encoders:
        built[name] = {tensor_names.canonical(name, key): shape for key, shape in built[name].items()}
    if configs.LAYOUTS[family].older_names:
        built["text_encoder"][POSITION_IDS] = (1, configs.POSITIONS)
        older = {f".{new}.": f".{old}." for old, new in tensor_names.OLD_VAE.items()}
        built["vae"] = {_older(key, older): shape for key, shape in built["vae"].items()}
    return built


def _older(key: str, names: Mapping[str, str]) -> str:
    """A tensor name with the older names of the VAE's attention."""
    for new, old in names.items():
        key = key.replace(new, old) if ".attentions." in key else key
    return key


def _write_random(path: Path, shapes: Mapping[str, Shape], component: str, seed: int, dtype: str) -> int:
    """Write one safetensors file of random tensors, one in memory at a time; returns the bytes of its tensors."""
    tensors: dict[str, tuple[str, Shape, Callable[[], Tensor]]] = {}
    for key, shape in shapes.items():
        kind = "I64" if key == POSITION_IDS else FLOATS[dtype]
        # Every tensor has its own seed, so that its values depend neither on shards nor on other tensors.
        own = [seed, zlib.crc32(f"{component}.{key}".encode())]
        tensors[key] = (kind, shape, partial(_random, key, shape, own, dtype))
    stream_tensors(path, tensors)
    return sum(entry.stop - entry.start for entry in read_header(path)[0].values())


def _random(key: str, shape: Shape, seed: list[int], dtype: str) -> Tensor:
    if key == POSITION_IDS:
        return torch.arange(configs.POSITIONS)[None]
    matrix = len(shape) > 1
    numbers = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    numbers *= math.prod(shape[1:]) ** -0.5 if matrix else 0.02
    numbers += 1.0 if key.endswith("weight") and not matrix else 0.0
    return torch.from_numpy(numbers).to(getattr(torch, dtype))


def random_pipeline(out: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Write a diffusers folder with random weights in the shapes of glyphs, for tests of formats."""
    assemble.write_tokenizer(out / "tokenizer", [sample(0, index).caption for index in range(300)], SIZES.vocabulary)
    tokens = assemble.tokenizer(out / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = networks.text_encoder(SIZES, len(tokens), tokens.bos_token_id, tokens.eos_token_id).state_dict()
        vae, unet = networks.vae(SIZES).state_dict(), networks.unet(SIZES).state_dict()
    assemble.write_pipeline(out, SIZES, text, vae, 0.18215, dtype)
    assemble.write_unet(out, SIZES, unet, dtype)
