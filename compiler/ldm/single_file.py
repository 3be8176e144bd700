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

from erasec.checkpoint.folder import WEIGHTS, Folder
from erasec.checkpoint.safetensors import Entry, read_header, read_tensor, stream
from erasec.errors import ErasecError
from erasec.ldm import configs
from erasec.ldm import skeleton as layouts
from erasec.ldm import tensor_names as keys
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Changed
    from erasec.family import Shape

BASE_STEPS = 875000


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
        rescaled = self.family == "sdxl" and "ztsnr" in read_header(self.file)[0]
        layouts.write_skeleton(root, self.family, self._shapes, self._prediction, rescaled)
        return root

    @cached_property
    def _shapes(self) -> dict[str, dict[str, Shape]]:
        return {name: {key: entry.shape for key, entry in part.items()} for name, part in self._all.items()}

    @cached_property
    def _prediction(self) -> str:
        """What the file says that its UNet predicts, "epsilon" or "v_prediction"; "" where it says nothing."""
        entries, metadata = read_header(self.file)
        if self.family == "sdxl" and "v_pred" in entries:
            return "v_prediction"
        if told := metadata.get("modelspec.prediction_type", ""):
            return "v_prediction" if told == "v" else told
        # SD 2's 512-pixel base is known by how long it was trained, as diffusers' from_single_file knows it.
        steps = read_tensor(entries["global_step"]).tolist() if "global_step" in entries else None
        return "epsilon" if self.family == "sd2" and steps in (BASE_STEPS, [BASE_STEPS]) else ""

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what the file does not say, and what was assumed in its place."""
        usual = configs.usual_prediction(self.family, configs.sizes_from_shapes(self.family, self._shapes))
        if self._prediction or usual == "epsilon":
            return ()
        return (
            f"{self.file.name} does not say what its UNet predicts: v is assumed, as in SD 2's 768-pixel models. If it "
            "predicts epsilon (the 512-pixel ones do), give the model as a diffusers folder.",
        )

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
        """Raises ErasecError for a tensor that the file holds in another form, such as the fused q, k and v of
        a text encoder."""
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
