"""A target of your own in one file: ``erasec build glyphs --erase star --target examples/my_target.py:Npz``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_tensor
from erasec.options import options


@options
class Npz(Target):
    """Writes ``COMPONENT.npz``, the tensors of a component by name. ``numpy.load`` reads it without torch."""

    precision: Literal["fp32", "fp16"] = "fp32"

    name: ClassVar[str] = "npz"
    summary: ClassVar[str] = "an example: one NumPy archive for each component"

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        dtype, rtol, atol = {"fp32": (np.float32, 0.0, 0.0), "fp16": (np.float16, 5e-4, 1e-7)}[self.precision]
        wrong: list[str] = []
        for component in sorted({file.parent.name for file in checkpoint.root.glob("*/*.safetensors")}):
            entries = checkpoint.entries(component)
            with zipfile.ZipFile(out / f"{component}.npz", "w") as archive:  # one tensor in memory at a time
                for key, entry in entries.items():
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, read_tensor(entry).float().numpy().astype(dtype))
            with np.load(out / f"{component}.npz") as arrays:  # the check reads what was written
                for key, entry in entries.items():
                    if not np.allclose(arrays[key], read_tensor(entry).float().numpy(), rtol, atol):
                        wrong.append(f"{component} {key}")
        check = Check.count("npz/tensors", wrong, f"tensors that differ from the merged checkpoint, {self.precision}")
        return Artifact(self.name, out, (check,), self.precision)
