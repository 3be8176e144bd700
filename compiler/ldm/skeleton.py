"""Configs and tokenizers of a diffusers folder, written for tensors of known shapes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from erasec.errors import ErasecError, suggestion
from erasec.family import FAMILIES, Shape
from erasec.ldm import joint_configs
from erasec.ldm.configs import (
    END,
    LAYOUTS,
    POSITIONS,
    START,
    Shapes,
    check_clip,
    config_files,
    sizes_from_shapes,
)
from erasec.ldm.tensor_names import canonical


def write_skeleton(out: Path, family: str, shapes: Shapes, prediction: str = "", rescaled: bool = False) -> None:
    """Write a diffusers folder without its weights: index, configs, scheduler and CLIP's tokenizers.

    ``shapes`` are the tensors' shapes by component and tensor name in diffusers; all sizes are read from them. Two
    settings cannot be read from shapes: ``prediction`` is what the UNet predicts, "epsilon" or "v_prediction" ("" for
    the family's default), and ``rescaled`` says that the noise schedule has a zero terminal SNR
    (``rescale_betas_zero_snr``). Raises ErasecError if the shapes do not fit the family, or the vocabulary or the
    length of a prompt is not CLIP's.
    """
    if prediction not in ("", "epsilon", "v_prediction"):
        raise ErasecError(f"no UNet predicts {prediction!r}", why=suggestion(prediction, ("epsilon", "v_prediction")))
    sizes = sizes_from_shapes(family, shapes)
    check_clip(dict(zip(FAMILIES[family].text_encoders, sizes.texts, strict=True)))
    files = config_files(family, sizes, prediction, rescaled)
    _write(out, family, shapes, files, LAYOUTS[family].pad_tokens)


def write_joint_skeleton(out: Path, family: str, shapes: Shapes) -> None:
    """As ``write_skeleton``, for a family of transformers. Raises ErasecError for a model with T5's text encoder, whose
    tokenizer erasec does not have."""
    check_clip(joint_configs.clip_sizes(family, shapes))
    _write(out, family, shapes, joint_configs.config_files(family, shapes), joint_configs.layout(family).pad_tokens)


def _write(out: Path, family: str, shapes: Shapes, files: Mapping[str, Mapping[str, Any]], pads: Sequence[str]) -> None:
    _compare(shapes, shapes_of_classes(family, files))
    for name, content in files.items():
        write_json(out / name, content)
    for folder, pad in zip(("tokenizer", "tokenizer_2"), pads, strict=False):
        write_tokenizer(out / folder, pad)


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids, and its merges in their order. Not to be changed: it is read once."""
    packed = resources.files("erasec.ldm") / "clip" / "merges.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().splitlines()
    # CLIP's vocabulary starts with one visible character per byte: first the printable bytes of Latin-1 as themselves,
    # then a substitute for each of the other bytes.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, visible), *(chr(256 + number) for number in range(256 - len(visible)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate((*tokens, START, END))}, merges


def write_tokenizer(folder: Path, pad: str = END) -> None:
    """Write the files of CLIP's tokenizer that transformers' CLIPTokenizer reads. ``pad`` is the padding token."""
    vocabulary, merges = clip_vocabulary()
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": POSITIONS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**special, **settings, "tokenizer_class": "CLIPTokenizer"})


def _compare(shapes: Shapes, expected: Shapes) -> None:
    """Raise ErasecError for the first tensor whose shape differs from the ``expected`` one, or that only one has."""
    for component, tensors in expected.items():
        actual = {canonical(component, key): shape for key, shape in shapes[component].items()}
        wanted = {canonical(component, key): shape for key, shape in tensors.items()}
        # A text encoder may contain unused tensors: position_ids, logit_scale or a projection.
        for key in sorted(wanted if component.startswith("text_encoder") else {*wanted, *actual}):
            if wanted.get(key) != actual.get(key):
                raise ErasecError(
                    f"{component} fits no config that erasec writes",
                    why=f"{key} is {actual.get(key, 'missing')}, and with that config {wanted.get(key, 'not there')}",
                    fix="give the model as a diffusers folder, which contains its configs",
                )


def shapes_of_classes(family: str, files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Shape]]:
    """The shapes that the libraries' classes have with these configs, by component and tensor name.

    The networks are created on the meta device, without memory for weights. Raises ErasecError for impossible sizes.
    """
    import diffusers
    import torch
    import transformers

    shapes = {}
    for component in FAMILIES[family].components:
        if f"{component}/config.json" not in files:
            continue
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
        shapes[component] = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return shapes


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with sorted keys; its folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
