"""What a diffusers folder holds besides weights, written for tensors of known shapes; and random weights to fill it.

Folders with random weights have a family's exact layout: for tests and benchmarks where no download is wanted.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.safetensors import read_header, stream
from erasec.errors import ErasecError, nearest
from erasec.family import FAMILIES, Shape
from erasec.ldm.configs import (
    END,
    LAYOUTS,
    OLD_VAE,
    POSITIONS,
    SIZES,
    START,
    Shapes,
    config_files,
    known,
    plain,
    rename,
    sizes_from_shapes,
)

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# The published SD 1 and SD 2 were saved by older libraries: the VAE's attention has other names, and the text encoder
# stores the numbers of its positions.
OLD = ("sd1", "sd2")
POSITION_IDS = "text_model.embeddings.position_ids"


def write_skeleton(out: Path, family: str, shapes: Shapes, prediction: str = "", rescaled: bool = False) -> None:
    """Write a diffusers folder but for its weights: index, configs, scheduler and CLIP's tokenizers.

    ``shapes`` are the tensors' shapes by component and diffusers key; every size is read from them. ``prediction`` is
    what the UNet predicts, "epsilon" or "v_prediction", which no shape shows; the family's own where it is empty.
    ``rescaled``: the noise schedule ends without any signal (rescale_betas_zero_snr), no shape shows that either.
    Raises ErasecError where the shapes are not those of the family, or where the tokenizer cannot be CLIP's.
    """
    if prediction not in ("", "epsilon", "v_prediction"):
        raise ErasecError(f"no UNet predicts {prediction!r}", why=nearest(prediction, ("epsilon", "v_prediction")))
    files = config_files(family, sizes_from_shapes(family, shapes), prediction, rescaled)
    _compare(shapes, _built(family, files))
    for name, content in files.items():
        _write_json(out / name, content)
    for folder, pad in zip(("tokenizer", "tokenizer_2"), LAYOUTS[family].pads, strict=False):
        write_tokenizer(out / folder, pad)


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
        raise ErasecError(f"weights are not written as {dtype}", why=nearest(dtype, FLOATS))
    if seed < 0 or not 1 <= shards <= len(tensors["unet"]):
        raise ErasecError(
            f"seed {seed} and {shards} shards make no folder",
            why=f"seeds start at 0, and the UNet's {len(tensors['unet'])} tensors fill 1 to as many shards",
        )
    write_skeleton(out, family, tensors)
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
            _write_json(out / component / f"{stem}.safetensors.index.json", index)


def random_shapes(family: str, size: str) -> dict[str, dict[str, Shape]]:
    """Shapes by component and key of what ``random_folder`` writes, with the keys of the published files."""
    known(family)
    if (family, size) not in SIZES:
        raise ErasecError(f"there is no size {size!r}", why=nearest(size, ("full", "tiny")))
    built = _built(family, config_files(family, SIZES[family, size]))
    for name in FAMILIES[family].text_encoders:
        built[name] = {
            key if key.startswith("text_projection.") else f"text_model.{plain(key)}": shape
            for key, shape in built[name].items()
        }
    if family in OLD:
        built["text_encoder"][POSITION_IDS] = (1, POSITIONS)
        names = {new: old for old, new in OLD_VAE.items()}
        built["vae"] = {rename(key, names): shape for key, shape in built["vae"].items()}
    return built


def write_tokenizer(folder: Path, pad: str = END) -> None:
    """Write CLIP's tokenizer as transformers' CLIPTokenizer reads it; ``pad`` is its padding token."""
    packed = resources.files("erasec.ldm") / "clip" / "merges.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().splitlines()
    # A visible letter for each byte, in CLIP's order: printable Latin-1 as it is, then stand-ins for the rest.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate((*tokens, START, END))}
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    more = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": POSITIONS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**special, **more, "tokenizer_class": "CLIPTokenizer"})


def _compare(given: Shapes, built: Shapes) -> None:
    """Raise ErasecError at the first tensor that the configs' own classes would not have, or not in that shape."""
    for component, wanted in built.items():
        have = {plain(key): shape for key, shape in given[component].items()}
        want = {plain(key): shape for key, shape in wanted.items()}
        # A text encoder may bring position_ids, logit_scale or a projection that is not used, whoever saved it.
        for key in sorted({*want, *have} if component in ("unet", "vae") else want):
            if want.get(key) != have.get(key):
                raise ErasecError(
                    f"{component} fits no config that erasec writes",
                    why=f"{key} is {have.get(key, 'missing')}, and with that config {want.get(key, 'not there')}",
                    fix="give the model as a diffusers folder, which holds its own configs",
                )


def _built(family: str, files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Shape]]:
    """Shapes by component and key of the libraries' own classes, made from their configs and without any weights."""
    import diffusers
    import torch
    import transformers

    found = {}
    for component in FAMILIES[family].components:
        library, name = files["model_index.json"][component]
        options = {key: value for key, value in files[f"{component}/config.json"].items() if key[0] != "_"}
        try:
            with torch.device("meta"):
                if library == "diffusers":
                    model = getattr(diffusers, name)(**options)
                else:
                    model = getattr(transformers, name)(transformers.CLIPTextConfig(**options))
        except ValueError as error:
            raise ErasecError(f"{component} has sizes that no {name} can have", why=str(error)) from error
        found[component] = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_random(path: Path, shapes: Mapping[str, Shape], component: str, seed: int, dtype: str) -> int:
    """Write one safetensors file of random tensors, one in memory at a time; returns the bytes of its tensors."""
    tensors: dict[str, tuple[str, Shape, Callable[[], Tensor]]] = {}
    for key, shape in shapes.items():
        kind = "I64" if key == POSITION_IDS else FLOATS[dtype]
        # Every tensor has a seed of its own, so that its values depend neither on shards nor on other tensors.
        own = [seed, zlib.crc32(f"{component}.{key}".encode())]
        tensors[key] = (kind, shape, partial(_random, key, shape, own, dtype))
    stream(path, tensors)
    return sum(entry.stop - entry.start for entry in read_header(path)[0].values())


def _random(key: str, shape: Shape, seed: list[int], dtype: str) -> Tensor:
    import numpy as np
    import torch

    if key == POSITION_IDS:
        return torch.arange(POSITIONS)[None]
    matrix = len(shape) > 1
    numbers = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    numbers *= math.prod(shape[1:]) ** -0.5 if matrix else 0.02
    numbers += 1.0 if key.endswith("weight") and not matrix else 0.0
    return torch.from_numpy(numbers).to(getattr(torch, dtype))
