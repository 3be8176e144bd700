"""A single file in the original Stable Diffusion layout (LDM), read as an equivalent diffusers folder.

The file is not converted: each tensor of the folder is read from its place in the file. A single file has no configs
and no tokenizers; these are derived from the family and the shapes, and written to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.folder import WEIGHTS, Folder
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.quantised import refuse_scales
from erasec.checkpoint.safetensors import DTYPES, Entry, read_header, read_tensor, save_tensors, stream_tensors
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.ldm.configs import default_prediction, sizes_from_shapes
from erasec.ldm.skeleton import write_joint_skeleton, write_skeleton
from erasec.ldm.tensor_names import PROJECTION, TensorLocation, detect_single, from_single, layout
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Changed
    from erasec.family import Shape


class SingleFile(Folder):
    """The diffusers folder that is equivalent to ``file``, which holds the weights of all components.

    A file of a transformer may lack other components. Their edits can be merged into it, but no folder can be made of
    it (``prepare``). Raises ErasecError if the file is no checkpoint of a known family, or holds quantised weights.
    """

    file: Path
    family: str

    def __init__(self, file: Path) -> None:
        shapes = {key: entry.shape for key, entry in read_header(file)[0].items()}
        refuse_scales(file, shapes)
        self.__dict__.update(file=file, variant="", family=detect_single(shapes))

    @cached_property
    def root(self) -> Path:
        """A temporary folder with configs and tokenizers. It is written when it is first used."""
        root = Path(tempfile.mkdtemp(dir=process_scratch()))
        if FAMILIES[self.family].joint_configs is not None:
            self._check_complete()
            write_joint_skeleton(root, self.family, self._shapes)
            return root
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
        if FAMILIES[self.family].flow:
            return ()
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
            components.setdefault(component, {})[key] = entry_at(entries[place.key], place)
        for component in layout(self.family).unprojected:
            if component in components:
                components[component][PROJECTION] = _identity(components[component])
        return components

    @property
    def components(self) -> tuple[str, ...]:
        """The components whose weights the file holds."""
        return tuple(self._components)

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
        """As in ``Folder``. A tensor that the file stores in another form, such as one of q, k and v of a layer, which
        are one tensor there, takes its place in the file's tensor. Raises ErasecError for a tensor that it lacks."""
        parts: dict[str, list[tuple[TensorLocation, Callable[[], Tensor]]]] = {}
        for component, tensors in changed.items():
            for key, make in tensors.items():
                if (component, key) not in self._places:
                    raise ErasecError(
                        f"{component}/{key} cannot be replaced in {self.file.name}",
                        why="the file does not hold it: its readers take the identity",
                        fix="write a diffusers folder: --out DIR",
                    )
                place = self._places[component, key]
                parts.setdefault(place.key, []).append((place, make))
        entries, _ = read_header(self.file)
        return {self.file: {key: partial(_assembled, entries[key], own) for key, own in parts.items()}}

    def _check_complete(self) -> None:
        """Raise ErasecError for a file of a transformer that does not hold all that a folder needs."""
        family, own = FAMILIES[self.family], layout(self.family)
        required = (name for name in family.components if name not in family.optional)
        missing = [name for name in required if name not in self._components]
        if t5 := [name for name in own.t5 if name in self._components]:
            what, why = (
                f"T5 ({t5[0]}) without its tokenizer",
                "erasec brings CLIP's tokenizer for single files, not T5's",
            )
        elif missing:
            what, why = f"no {' and no '.join(missing)}", "an edit is solved for text states, and checked in pictures"
        else:
            return
        assert family.joint_configs is not None  # as the caller has checked
        raise ErasecError(
            f"{self.file.name} holds {what}",
            why=why,
            where=str(self.file),
            fix=f"give {family.title} as a diffusers folder, and merge the edit into this file: erasec build FOLDER "
            f"... --target edit, then erasec apply EDIT {self.file.name} --out NEW.safetensors (--transfer for a "
            f"fine-tune). Or make a folder of the file: {family.denoiser_class}.from_single_file(FILE), then "
            f"{family.joint_configs.pipeline}.from_pretrained(BASE, transformer=...).save_pretrained(FOLDER)",
        )

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


def entry_at(whole: Entry, place: TensorLocation) -> Entry:
    """The entry of a folder's tensor, which is a range of rows of the file's tensor ``whole``."""
    row_bytes = (whole.stop - whole.start) // max(1, place.shape[0])
    rows = place.rows or place.shape[0]
    start = whole.start + place.start * row_bytes
    stop = start + rows * row_bytes
    return Entry(whole.file, whole.dtype, place.folder_shape, start, stop, place.transposed, place.swapped)


def _identity(encoder: Mapping[str, Entry]) -> Entry:
    """The projection of a CLIP ``encoder`` for which readers take the identity, written to a file of this process."""
    import torch

    embedding = encoder["text_model.embeddings.token_embedding.weight"]
    file = Path(tempfile.mkdtemp(dir=process_scratch())) / "identity.safetensors"
    save_tensors(file, {PROJECTION: torch.eye(embedding.shape[1], dtype=getattr(torch, DTYPES[embedding.dtype]))})
    return read_header(file)[0][PROJECTION]


def stored_form(place: TensorLocation, tensor: Tensor) -> Tensor:
    """A folder's tensor as the rows of the file's tensor at its ``place``."""
    import torch

    if place.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    rows = place.rows or place.shape[0]
    return (tensor.T if place.transposed else tensor).reshape(rows, *place.shape[1:])


def _assembled(whole: Entry, parts: Sequence[tuple[TensorLocation, Callable[[], Tensor]]]) -> Tensor:
    """The file's tensor ``whole`` with the folder's tensors at these places replaced."""
    tensor = read_tensor(whole)
    for place, make in parts:
        new = make()
        if new.shape != place.folder_shape or new.dtype != tensor.dtype:
            raise ErasecError(
                f"a new part of {place.key} is {new.dtype} {tuple(new.shape)}",
                why=f"in the file it is {tensor.dtype} {place.folder_shape}, and edits keep dtypes and shapes",
            )
        tensor[place.start : place.start + (place.rows or place.shape[0])] = stored_form(place, new)
    return tensor
