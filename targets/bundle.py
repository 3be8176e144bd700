"""Target bundle: a diffusers folder with all that it carries beside its weights, which ``erasec.pipeline`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, Target, finite
from erasec.checkpoint.folder import CARRIED
from erasec.checkpoint.safetensors import dtype_name, read_header, read_tensor, tensor_bytes
from erasec.errors import ErasecError
from erasec.model import sidecar as extras_
from erasec.targets.hf import same_layout, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model


@dataclass(frozen=True)
class Bundle(Target):
    """Copies the merged checkpoint and its extras: memories, new tokens, a negative prompt."""

    name: ClassVar[str] = "bundle"
    summary: ClassVar[str] = "a diffusers folder with memories, tokens and negative prompt, for erasec.pipeline"
    holds: ClassVar[frozenset[str]] = extras_.KINDS

    def size(self, model: Model) -> int:
        """The size of the model's own files; what is carried beside them is small."""
        return model.source.size()

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Copy ``checkpoint`` to ``out``, or only check it where it lies there already."""
        copy = type(checkpoint)(out)
        layout: tuple[Check, ...] = ()
        if out.resolve() != checkpoint.root.resolve():
            checkpoint.write(out, {})
            layout = (same_layout(checkpoint, copy),)
        checks = finite("finite", tensors(copy)), *layout, loads(checkpoint.root, out), fits(copy)
        return Artifact(self.name, out, checks)


def loads(source: Path, root: Path) -> Check:
    """Count the tensors of ``source``'s file of extras that differ, bit for bit, from the extras read from ``root``."""
    stored = read_header(source / CARRIED)[0] if (source / CARRIED).is_file() else {}
    wanted = {key: _bits(read_tensor(entry)) for key, entry in stored.items()}
    try:
        found = {key: _bits(tensor) for key, tensor in extras_.read(root).tensors.items()}
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        first = f"; the first that differs is {different[0]}" if different else ""
    except ErasecError as error:
        different, first = [CARRIED], f"; {error.what}"
    how = f"tensors of memories and tokens, {len(wanted)} in the file, read as a pipeline does, bit for bit{first}"
    return Check("bundle/loads", float(len(different)), 0.0, not different, how)


def fits(folder: Folder) -> Check:
    """Count the memories and tokens of a folder that do not fit its weights, by their shapes."""
    extras = extras_.read(folder.root)
    unet = {key: entry.shape for key, entry in folder.entries("unet").items()} if extras.memories else {}
    text = {key: entry.shape for key, entry in folder.entries("text_encoder").items()} if extras.tokens else {}
    widths = {shape[1] for key, shape in text.items() if key.endswith("token_embedding.weight")}
    wrong = [
        memory.attention for memory in extras.memories for part, rows in (("k", memory.keys), ("v", memory.values))
        if unet.get(f"{memory.attention}.to_{part}.weight", ())[:1] != tuple(rows.shape[1:])
    ]  # fmt: skip
    wrong += [name for name, row in extras.tokens.items() if {*row.shape} != widths]
    how = f"{len(extras.memories)} memories and {len(extras.tokens)} tokens against the shapes of unet and text_encoder"
    if wrong:
        how += f"; the first that does not fit is {wrong[0]}"
    return Check("bundle/fits", float(len(wrong)), 0.0, not wrong, how)


def _bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return dtype_name(tensor), tuple(tensor.shape), tensor_bytes(tensor)
