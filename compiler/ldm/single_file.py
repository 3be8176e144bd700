"""A single file in the original Stable Diffusion layout (LDM), read as an equivalent diffusers folder.

The file is not converted: each tensor of the folder is read from its place in the file. A single file has no configs
and no tokenizers; these are derived from the family and the shapes, and written to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.folder import WEIGHTS, Folder
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.safetensors import Entry, read_header, read_tensor, stream_tensors
from erasec.errors import ErasecError
from erasec.ldm.configs import default_prediction, sizes_from_shapes
from erasec.ldm.skeleton import write_skeleton
from erasec.ldm.tensor_names import TensorLocation, detect_single, from_single, layout
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Changed
    from erasec.family import Shape


class SingleFile(Folder):
    """The diffusers folder that is equivalent to ``file``, which holds the weights of all components.

    Raises ErasecError if the file is not a Stable Diffusion checkpoint.
    """

    file: Path
    family: str

    def __init__(self, file: Path) -> None:
        shapes = {key: entry.shape for key, entry in read_header(file)[0].items()}
        self.__dict__.update(file=file, variant="", family=detect_single(shapes))

    @cached_property
    def root(self) -> Path:
        """A temporary folder with configs and tokenizers. It is written when it is first used."""
        root = Path(tempfile.mkdtemp(dir=process_scratch()))
        rescaled = layout(self.family).zero_snr_mark in read_header(self.file)[0]
        write_skeleton(root, self.family, self._shapes, self._prediction, rescaled)
        return root

    @cached_property
    def _shapes(self) -> dict[str, dict[str, Shape]]:
        return {name: {key: entry.shape for key, entry in part.items()} for name, part in self._components.items()}

    @cached_property
    def _prediction(self) -> str:
        """The prediction type that the file states, "epsilon" or "v_prediction"; "" if it states none."""
        entries, metadata = read_header(self.file)
        own_layout = layout(self.family)
        if own_layout.v_prediction_mark in entries:
            return "v_prediction"
        if stated := metadata.get("modelspec.prediction_type", ""):
            return "v_prediction" if stated == "v" else stated
        step = read_tensor(entries["global_step"]).tolist() if "global_step" in entries else None
        epsilon_step = own_layout.epsilon_global_step
        return "epsilon" if epsilon_step and step in (epsilon_step, [epsilon_step]) else ""

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Sentences about settings that the file does not state, and what is assumed for them."""
        default = default_prediction(self.family, sizes_from_shapes(self.family, self._shapes))
        if self._prediction or default == "epsilon":
            return ()
        return (
            f"{self.file.name} does not say what its UNet predicts: v is assumed, as in SD 2's 768-pixel models. If it "
            "predicts epsilon, as the 512-pixel models do, give the model as a diffusers folder.",
        )

    @cached_property
    def _places(self) -> dict[tuple[str, str], TensorLocation]:
        shapes = {key: entry.shape for key, entry in read_header(self.file)[0].items()}
        return from_single(self.family, shapes)

    @cached_property
    def _components(self) -> dict[str, dict[str, Entry]]:
        components: dict[str, dict[str, Entry]] = {}
        entries, _ = read_header(self.file)
        for (component, key), place in self._places.items():
            components.setdefault(component, {})[key] = _entry(entries[place.key], place)
        return components

    def prepare(self) -> None:
        """Write configs and tokenizers. Raises ErasecError if they cannot be derived from the tensors."""
        self.root  # noqa: B018

    def size(self) -> int:
        """Bytes of the weights. Configs and tokenizers are not counted."""
        return self.file.stat().st_size

    def weight_files(self, component: str) -> tuple[Path, ...]:
        return (self.file,)

    def read_files(self) -> tuple[Path, ...]:
        return (self.file,)

    def entries(self, component: str) -> dict[str, Entry]:
        return self._components[component]

    def by_file(self, changed: Changed) -> dict[Path, dict[str, Callable[[], Tensor]]]:
        """As in ``Folder``. Raises ErasecError for a tensor that the file stores in another form, such as one of q, k
        and v of an OpenCLIP layer, which are one tensor there."""
        makers: dict[str, Callable[[], Tensor]] = {}
        for component, tensors in changed.items():
            for key, make in tensors.items():
                place = self._places[component, key]
                if place.rows or place.transposed or place.linear:
                    raise ErasecError(
                        f"{component}/{key} cannot be replaced in {self.file.name}",
                        why=f"the file stores it in another form, in {place.key}",
                        fix="write a diffusers folder: --out DIR",
                    )
                makers[place.key] = make
        return {self.file: makers}

    def other_copies(self, components: object) -> tuple[Path, ...]:
        """Empty: a single file has no further copies of its weights."""
        return ()

    def write(self, out: Path, changed: Changed, link: bool = False) -> None:
        """Write the equivalent diffusers folder, with tensors replaced as in ``Folder.write``."""
        super().write(out, {}, link)
        with bar("write", len(self._components)) as advance:
            for component, entries in self._components.items():
                replaced = changed.get(component, {})
                name = WEIGHTS["text_encoder" in component]
                tensors = {
                    key: (entry.dtype, entry.shape, replaced.get(key) or _reader(entry))
                    for key, entry in entries.items()
                }
                stream_tensors(out / component / f"{name}.safetensors", tensors, {"format": "pt"})
                advance(note=component)


def _reader(entry: Entry) -> Callable[[], Tensor]:
    return lambda: read_tensor(entry)


def _entry(whole: Entry, place: TensorLocation) -> Entry:
    """The entry of a folder's tensor, which is a range of rows of the file's tensor ``whole``."""
    row_bytes = (whole.stop - whole.start) // max(1, place.shape[0])
    rows = place.rows or place.shape[0]
    start = whole.start + place.start * row_bytes
    return Entry(whole.file, whole.dtype, place.folder_shape, start, start + rows * row_bytes, place.transposed)
