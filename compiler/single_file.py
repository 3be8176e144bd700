"""A single file in the original Stable Diffusion layout, seen as the diffusers folder that it amounts to.

Nothing is converted: each diffusers tensor is found where it lies in the file. Configs and tokenizers, which a single
file does not hold, follow from the family and the tensors' shapes and are written to a temporary folder.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from erasec import keys, layouts
from erasec.checkpoint import WEIGHTS, Entry, Folder, read_header, read_tensor, stream
from erasec.errors import ErasecError
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint import Changed


class SingleFile(Folder):
    """``file`` holds the weights of every component. Raises ErasecError where it is no Stable Diffusion checkpoint."""

    file: Path
    family: str

    def __init__(self, file: Path) -> None:
        shapes = {key: entry.shape for key, entry in read_header(file)[0].items()}
        self.__dict__.update(file=file, variant="", family=keys.detect_single(shapes))

    @cached_property
    def root(self) -> Path:
        """A temporary folder with configs and tokenizers, made when something in it is first asked for."""
        root = Path(tempfile.mkdtemp(prefix="erasec-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        shapes = {name: {key: entry.shape for key, entry in part.items()} for name, part in self._all.items()}
        prediction = read_header(self.file)[1].get("modelspec.prediction_type", "")
        layouts.write_skeleton(root, self.family, shapes, "v_prediction" if prediction == "v" else prediction)
        return root

    @cached_property
    def _places(self) -> dict[tuple[str, str], keys.Place]:
        shapes = {key: entry.shape for key, entry in read_header(self.file)[0].items()}
        return keys.from_single(self.family, shapes)

    @cached_property
    def _all(self) -> dict[str, dict[str, Entry]]:
        found: dict[str, dict[str, Entry]] = {}
        entries, _ = read_header(self.file)
        for (component, key), place in self._places.items():
            found.setdefault(component, {})[key] = _entry(entries[place.key], place)
        return found

    def prepare(self) -> None:
        """Write the small files. Raises ErasecError where they cannot be told from the tensors."""
        self.root  # noqa: B018

    def size(self) -> int:
        """Bytes of the weights; what comes beside them are a few small files."""
        return self.file.stat().st_size

    def weight_files(self, component: str) -> tuple[Path, ...]:
        return (self.file,)

    def entries(self, component: str) -> dict[str, Entry]:
        return self._all[component]

    def placed(self, changed: Changed) -> dict[Path, dict[str, Callable[[], Tensor]]]:
        """Raises ErasecError for a tensor that the file holds in another form, which no edit of today changes."""
        found: dict[str, Callable[[], Tensor]] = {}
        for component, tensors in changed.items():
            for key, make in tensors.items():
                place = self._places[component, key]
                if place.rows or place.transposed or place.linear:
                    raise ErasecError(
                        f"{component}/{key} cannot be replaced in {self.file.name}", why=f"it is a part of {place.key}",
                        fix="write a diffusers folder: --out DIR",
                    )  # fmt: skip
                found[place.key] = make
        return {self.file: found}

    def doubles(self, components: object) -> tuple[Path, ...]:
        """None: the file is all there is."""
        return ()

    def write(self, out: Path, changed: Changed, link: bool = False) -> None:
        """Write the diffusers folder that the file amounts to, tensors replaced as in ``Folder.write``."""
        super().write(out, {}, link)
        with bar("write", len(self._all)) as advance:
            for component, entries in self._all.items():
                replaced = changed.get(component, {})
                name = WEIGHTS["text_encoder" in component]
                tensors = {
                    key: (entry.dtype, entry.shape, replaced.get(key) or _reader(entry))
                    for key, entry in entries.items()
                }
                stream(out / component / f"{name}.safetensors", tensors, {"format": "pt"})
                advance(note=component)


def _reader(entry: Entry) -> Callable[[], Tensor]:
    return lambda: read_tensor(entry)


def _entry(whole: Entry, place: keys.Place) -> Entry:
    """Where a diffusers tensor lies: some rows of an LDM tensor, perhaps of another rank, perhaps transposed."""
    shape = place.folder_shape
    size = (whole.stop - whole.start) // max(1, place.shape[0])
    rows = place.rows or place.shape[0]
    start = whole.start + place.start * size
    return Entry(whole.file, whole.dtype, shape, start, start + rows * size, place.transposed)
