"""Target hf: a diffusers folder, which StableDiffusionPipeline.from_pretrained reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, Target, finite
from erasec.checkpoint.safetensors import read_header
from erasec.model.sidecar import read, refuse

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.checkpoint.safetensors import Entry
    from erasec.model.view import Model


@dataclass(frozen=True)
class Hf(Target):
    """Copies the merged checkpoint as it is: keys, dtypes, shapes and every byte."""

    name: ClassVar[str] = "hf"
    summary: ClassVar[str] = "a diffusers folder, with the base's own keys, dtypes and files"

    def size(self, model: Model) -> int:
        """The size of the model's own files."""
        return model.source.size()

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Copy ``checkpoint`` to ``out``, or only check it where it lies there already.

        Raises ErasecError where the checkpoint carries more than weights.
        """
        refuse(read(checkpoint.root), self.holds, self.name)
        if out.resolve() == checkpoint.root.resolve():
            return Artifact(self.name, out, (finite("finite", tensors(checkpoint)),))
        checkpoint.write(out, {})
        copy = type(checkpoint)(out)
        return Artifact(self.name, out, (finite("finite", tensors(copy)), same_layout(checkpoint, copy)))


def same_layout(source: Folder, copy: Folder) -> Check:
    """Count what differs: files by name and size, tensors by key, dtype and shape."""
    sizes = [{name.as_posix(): (each.root / name).stat().st_size for name in each.files()} for each in (source, copy)]
    layouts = [
        {key: (entry.dtype, entry.shape) for key, entry in tensors(each).items()} for each in (source, copy)
    ]  # fmt: skip
    other = sorted(name for name, _ in sizes[0].items() ^ sizes[1].items())
    other += sorted(key for key, _ in layouts[0].items() ^ layouts[1].items())
    different = sorted(set(other))
    how = f"files by name and size ({len(sizes[0])}), tensors by key, dtype and shape ({len(layouts[0])})"
    if different:
        how += f"; the first that differs is {different[0]}"
    return Check("layout", float(len(different)), 0.0, not different, how)


def tensors(folder: Folder) -> dict[str, Entry]:
    """Every tensor of every safetensors file, by file and key."""
    found: dict[str, Entry] = {}
    for name in folder.files():
        if name.suffix == ".safetensors":
            entries, _ = read_header(folder.root / name)
            found |= {f"{name.as_posix()} {key}": entry for key, entry in entries.items()}
    return found
