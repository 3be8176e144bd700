"""Pickled checkpoints: only their tensors are read, no code in them is run, and they are converted to safetensors."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path

from erasec.checkpoint.disk import DiskFull, free_bytes
from erasec.checkpoint.folder import Folder, ShardIndex, variants
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.safetensors import file_digest, save_tensors
from erasec.documents import POINTER, read_json, refuse_pointer
from erasec.errors import ErasecError, reason

# The names of pickled weights, or of the index of their shards, in transformers and diffusers.
PICKLE_NAME = re.compile(r"(?:pytorch_model|(diffusion_pytorch_)model)(.*)\.bin((?:\.[^.]+)?\.index.*\.json)?")
# The parts of such a name that mark a shard or an index. Without them, the middle of the name is the variant.
SHARD = re.compile(r"-\d+(?:-of-\d+)?|\.index|\.json")
# Components of model_index.json that erasec neither edits nor reads.
UNREAD = ("safety_checker", "feature_extractor")


def from_pickle(path: Path, out: Path) -> None:
    """Write the tensors of a pickled checkpoint (.ckpt, .bin, .pt, .pth) to a safetensors file, one at a time.

    No code in the pickle is run. Raises ErasecError for a pickle with anything except tensors and plain containers. Of
    a training state, the tensors in ``state_dict`` are written. Tensors that share memory are each written completely.
    The file is memory-mapped, so peak memory is one tensor; files written before torch 1.6 are read completely.
    """
    import torch

    with path.open("rb") as stream:
        refuse_pointer(path, stream.read(len(POINTER)))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch, pickle and zipfile raise many types
        class_match = re.search(r"GLOBAL (\S+)", str(error))
        raise ErasecError(
            f"{path.name} cannot be read as weights alone",
            where=str(path),
            why=f"it contains {class_match[1]}, which is no tensor, and nothing in a pickle is run"
            if class_match
            else reason(error),
            fix="give the model's safetensors, or load the file with the program that made it and save its tensors",
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ErasecError(
            f"{path.name} holds no tensors by name",
            why=f"it holds a {type(loaded).__name__}",
            fix="give a checkpoint that is a dict of tensors",
        )
    save_tensors(out, tensors)


def as_safetensors(path: Path) -> Path:
    """Convert a pickled checkpoint to a safetensors file, named by its digest. It is deleted when the process ends.

    The file is in the system's temporary folder, which TMPDIR sets, and is about as large as the pickle.
    """
    out = process_scratch() / f"{file_digest(path)[:32]}.safetensors"
    if not out.exists():
        if (needed := path.stat().st_size) > free_bytes(out.parent):
            raise DiskFull(out, needed)
        from_pickle(path, out)
    return out


def _unpickled_name(name: str) -> str:
    """The safetensors name for a pickle: model.fp16.safetensors for pytorch_model.fp16.bin; "" if it has no weights."""
    match = PICKLE_NAME.fullmatch(name)
    return f"{match[1] or ''}model{match[2]}.safetensors{match[3] or ''}" if match else ""


def _variant(name: str) -> str:
    """The variant in the name of pickled weights or of the index of their shards; "" for the plain ones."""
    match = PICKLE_NAME.fullmatch(name)
    return SHARD.sub("", match[2] + (match[3] or "")).lstrip(".") if match else ""


def _pickles_to_convert(folder: Path, variant: str) -> set[str]:
    """The names of the pickles, and indexes of pickles, in a component's folder that must be converted to be read.

    These are the pickles of ``variant``, else of the plain variant, else of all variants, so that the user can choose.
    Variants that exist as safetensors are not converted.
    """
    names = [path.name for path in folder.iterdir() if PICKLE_NAME.fullmatch(path.name)]
    safe = set(variants(folder))
    available = safe | {_variant(name) for name in names}
    convert = next(({wanted} for wanted in (variant, "") if wanted in available), available) - safe
    return {name for name in names if _variant(name) in convert}


def folder_as_safetensors(root: Path, variant: str = "") -> Path:
    """A temporary diffusers folder with pickled weights converted to safetensors, and links to all other files.

    Only the weights that are read are converted: those of ``variant``, or else the plain ones, of the components that
    model_index.json loads, except for the safety checker. Other pickles of these components are left out. Shards and
    variants keep their names, with another suffix. The folder is deleted when the process ends.
    """
    root = root.resolve()
    out = Path(tempfile.mkdtemp(dir=process_scratch()))
    folder = Folder(root)
    listed = (
        name for name, kind in folder.index.items() if isinstance(kind, list) and any(kind) and name not in UNREAD
    )
    to_convert = {name: _pickles_to_convert(root / name, variant) for name in listed if (root / name).is_dir()}
    for name in folder.files():
        new, component = _unpickled_name(name.name), name.parent.as_posix()
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if not new or component not in to_convert:
            (out / name).symlink_to(root / name)
        elif name.name not in to_convert[component]:
            continue
        elif name.suffix == ".json":
            index = read_json(root / name, ShardIndex)
            index["weight_map"] = {key: _unpickled_name(shard) for key, shard in index["weight_map"].items()}
            (out / name).with_name(new).write_text(json.dumps(index))
        else:
            (out / name).with_name(new).symlink_to(as_safetensors(root / name))
    return out
