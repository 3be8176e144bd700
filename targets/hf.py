"""Target hf: a diffusers folder, as DiffusionPipeline.from_pretrained reads it."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.safetensors import finite_check, read_header
from erasec.model.sidecar import check_supported, read_extras
from erasec.options import options

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.checkpoint.safetensors import Entry
    from erasec.model.view import Model


@options
class Hf(Target):
    """Copies the merged checkpoint byte for byte."""

    name: ClassVar[str] = "hf"
    summary: ClassVar[str] = "a diffusers folder, with the base's own keys, dtypes and files"

    def size(self, model: Model) -> int:
        """Bytes of the model's files."""
        return model.source.size()

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Copy ``checkpoint`` to ``out`` and check the copy. A checkpoint that is in ``out`` already is only checked.

        Raises ErasecError if the checkpoint carries more than weights.
        """
        check_supported(read_extras(checkpoint.root), self.extras, self.name)
        if out.resolve() == checkpoint.root.resolve():
            return Artifact(self.name, out, (finite_check("finite", tensors(checkpoint)),))
        checkpoint.write(out, {})
        copy = type(checkpoint)(out)
        return Artifact(self.name, out, (finite_check("finite", tensors(copy)), same_layout(checkpoint, copy)))

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        return (same_files(checkpoint, type(checkpoint)(out)),)


def same_layout(source: Folder, copy: Folder) -> Check:
    """A check that counts files that differ in name or size, and tensors that differ in name, dtype or shape."""
    folders = (source, copy)
    sizes = [{name.as_posix(): (folder.root / name).stat().st_size for name in folder.files()} for folder in folders]
    layouts = [{key: (entry.dtype, entry.shape) for key, entry in tensors(folder).items()} for folder in folders]
    different = {name for name, _ in sizes[0].items() ^ sizes[1].items()}
    different |= {key for key, _ in layouts[0].items() ^ layouts[1].items()}
    how = (
        f"files that differ in name or size, of {len(sizes[0])}; "
        f"tensors that differ in name, dtype or shape, of {len(layouts[0])}"
    )
    return Check.count("layout", sorted(different), how)


def same_files(source: Folder, copy: Folder) -> Check:
    """A check that counts the files that differ in any byte, or that only one of two folders has."""
    names = [{name.as_posix() for name in folder.files()} for folder in (source, copy)]
    both = sorted(names[0] & names[1])
    different = [name for name in both if not filecmp.cmp(source.root / name, copy.root / name, shallow=False)]
    how = f"files that are not the merged checkpoint's, byte for byte, of {len(names[0])}"
    return Check.count("same", sorted(names[0] ^ names[1]) + different, how)


def tensors(folder: Folder) -> dict[str, Entry]:
    """The tensors of all safetensors files of a folder, by "FILE TENSOR"."""
    result: dict[str, Entry] = {}
    for name in folder.files():
        if name.suffix == ".safetensors":
            entries, _ = read_header(folder.root / name)
            result |= {f"{name.as_posix()} {key}": entry for key, entry in entries.items()}
    return result
