"""Pickled checkpoints read as tensors alone: nothing in them is run, and they become safetensors before any use."""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from erasec.checkpoint.folder import Folder, variants
from erasec.checkpoint.safetensors import file_digest, save
from erasec.errors import ErasecError

# As transformers and diffusers name pickled weights, or the index of their shards.
PICKLE_NAME = re.compile(r"(?:pytorch_model|(diffusion_pytorch_)model)(.*)\.bin(\.index.*\.json)?")
# What makes such a name that of one shard, or of an index; what is left of its middle is the variant.
SHARD = re.compile(r"-\d+(?:-of-\d+)?|\.index|\.json")
# Listed in model_index.json, and never edited nor read here.
UNREAD = ("safety_checker", "feature_extractor")


def from_pickle(path: Path, out: Path) -> None:
    """Write the tensors of a pickled checkpoint (.ckpt, .bin, .pt, .pth) to a safetensors file, one at a time.

    Nothing in the pickle is run: what is more than tensors and plain containers is refused with an ErasecError. Of a
    training state, ``state_dict`` is taken. Tensors that share memory are each written whole. Peak memory is one
    tensor, as the file is mapped; files from before torch 1.6 cannot be mapped and are read whole.
    """
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch, pickle and zip raise a dozen kinds
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise ErasecError(
            f"{path.name} cannot be read as weights alone", where=str(path),
            why=f"it asks for {wanted[1]}, which is no tensor, and nothing in a pickle is run" if wanted
            else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason was given'}",
            fix="give the model's safetensors, or load the file with the program that made it and save its tensors",
        ) from error  # fmt: skip
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ErasecError(f"{path.name} holds no tensors by name", why=f"it holds a {type(loaded).__name__}")
    save(out, tensors)


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="erasec-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def unpickled(path: Path) -> Path:
    """A pickled checkpoint as a safetensors file, named by its content, that is there until this process ends.

    It is written below the system's temporary folder (TMPDIR moves it) and needs as much room as the pickle.
    """
    out = _scratch() / f"{file_digest(path)[:32]}.safetensors"
    if not out.exists():
        from_pickle(path, out)
    return out


def _unpickled_name(name: str) -> str:
    """``name`` as safetensors: transformers' pytorch_model.fp16.bin is model.fp16.safetensors; "" where no weights."""
    match = PICKLE_NAME.fullmatch(name)
    return f"{match[1] or ''}model{match[2]}.safetensors{match[3] or ''}" if match else ""


def _variant(name: str) -> str:
    """The variant that the name of pickled weights, or of the index of their shards, tells; "" for the plain ones."""
    match = PICKLE_NAME.fullmatch(name)
    return SHARD.sub("", match[2] + (match[3] or "")).lstrip(".") if match else ""


def _taken(folder: Path, variant: str) -> set[str]:
    """Names of the pickles, and indexes of such, in a component's folder that must become safetensors to be read.

    Of the variants there, that is the one asked for, or else the plain one, or else every one, to choose among; none
    where safetensors have it.
    """
    names = [path.name for path in folder.iterdir() if PICKLE_NAME.fullmatch(path.name)]
    safe = set(variants(folder))
    found = safe | {_variant(name) for name in names}
    read = next(({wanted} for wanted in (variant, "") if wanted in found), found) - safe
    return {name for name in names if _variant(name) in read}


def unpickled_folder(root: Path, variant: str = "") -> Path:
    """A diffusers folder with its pickled weights as safetensors and links to all else, there until this process ends.

    Only what is read becomes safetensors: of the components that model_index.json has loaded, without a safety checker,
    the weights of ``variant``, or the plain ones where it has not that. Their other pickles are left out. Shards and
    variants keep their names but for the ending.
    """
    root = root.resolve()
    out = Path(tempfile.mkdtemp(dir=_scratch()))
    folder = Folder(root)
    listed = (
        name for name, kind in folder.index.items() if isinstance(kind, list) and any(kind) and name not in UNREAD
    )
    taken = {name: _taken(root / name, variant) for name in listed if (root / name).is_dir()}
    for name in folder.files():
        new, component = _unpickled_name(name.name), name.parent.as_posix()
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if not new or component not in taken:
            (out / name).symlink_to(root / name)
        elif name.name not in taken[component]:
            continue
        elif name.suffix == ".json":
            index = json.loads((root / name).read_text())
            index["weight_map"] = {key: _unpickled_name(shard) for key, shard in index["weight_map"].items()}
            (out / name).with_name(new).write_text(json.dumps(index))
        else:
            (out / name).with_name(new).symlink_to(unpickled(root / name))
    return out
