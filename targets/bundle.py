"""Target bundle: a diffusers folder with the extras of the checkpoint, for ``erasec.pipeline``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.folder import EXTRAS_FILE
from erasec.checkpoint.safetensors import dtype_name, finite_check, read_header, read_tensor, tensor_bytes
from erasec.errors import ErasecError
from erasec.model.sidecar import KINDS, read_extras
from erasec.options import options
from erasec.targets.hf import same_files, same_layout, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model


@options
class Bundle(Target):
    """Copies the merged checkpoint with its extras: memories, new tokens and a negative prompt."""

    name: ClassVar[str] = "bundle"
    summary: ClassVar[str] = "a diffusers folder with memories, tokens and negative prompt, for erasec.pipeline"
    extras: ClassVar[frozenset[str]] = KINDS

    def size(self, model: Model) -> int:
        """The size of the model's own files. The extras are small and not counted."""
        return model.source.size()

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Copy ``checkpoint`` to ``out`` and check the copy. Where ``out`` is its own folder, nothing is copied."""
        copy = type(checkpoint)(out)
        layout: tuple[Check, ...] = ()
        if out.resolve() != checkpoint.root.resolve():
            checkpoint.write(out, {})
            layout = (same_layout(checkpoint, copy),)
        checks = finite_check("finite", tensors(copy)), *layout, loads_check(checkpoint.root, out), fits_check(copy)
        return Artifact(self.name, out, checks)

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        return (same_files(checkpoint, type(checkpoint)(out)),)


def loads_check(source: Path, root: Path) -> Check:
    """Count the tensors in the extras of the folder ``source`` that differ in any bit from those read from ``root``."""
    entries = read_header(source / EXTRAS_FILE)[0] if (source / EXTRAS_FILE).is_file() else {}
    wanted = {key: _bits(read_tensor(entry)) for key, entry in entries.items()}
    try:
        loaded = {key: _bits(tensor) for key, tensor in read_extras(root).tensors.items()}
        different = sorted(name for name in wanted.keys() | loaded.keys() if wanted.get(name) != loaded.get(name))
    except ErasecError as error:
        different = [error.what]
    how = f"tensors of memories and tokens, {len(wanted)} in the file, whose bits differ when read as a pipeline does"
    return Check.count("bundle/loads", different, how)


def fits_check(folder: Folder) -> Check:
    """Count the memories and tokens of a folder whose shapes do not match its weights."""
    extras = read_extras(folder.root)
    unet = {key: entry.shape for key, entry in folder.entries("unet").items()} if extras.memories else {}
    text = {key: entry.shape for key, entry in folder.entries("text_encoder").items()} if extras.tokens else {}
    widths = {shape[1] for key, shape in text.items() if key.endswith("token_embedding.weight")}
    wrong = [
        memory.attention
        for memory in extras.memories
        for projection, rows in (("k", memory.keys), ("v", memory.values))
        if unet.get(f"{memory.attention}.to_{projection}.weight", ())[:1] != tuple(rows.shape[1:])
    ]
    wrong += [name for name, row in extras.tokens.items() if {*row.shape} != widths]
    how = f"{len(extras.memories)} memories and {len(extras.tokens)} tokens against the shapes of unet and text_encoder"
    return Check.count("bundle/fits", wrong, how)


def _bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """What has to be equal for two tensors to be the same: dtype, shape and bytes (NaN is not equal to itself)."""
    return dtype_name(tensor), tuple(tensor.shape), tensor_bytes(tensor)
