"""A diffusers folder: which of its files hold a component's weights, and a copy of it with tensors replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.safetensors import Entry, copy, hard_link, patch, read_header
from erasec.errors import ErasecError
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    Changed = Mapping[str, Mapping[str, Callable[[], Tensor]]]  # new tensors by component and key

WEIGHTS = ("diffusion_pytorch_model", "model")
# Endings of files that may hold a component's weights once more, for other libraries and runtimes.
COPIES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".data", ".xml",
          ".pb", ".gguf")  # fmt: skip
CARRIED = "erasec.safetensors"  # what a checkpoint carries beside its weights; no copy of them
# stem[.variant].safetensors, or an index of shards with the variant before or after "safetensors.index"; no shard.
WEIGHT_NAME = re.compile(
    rf"({'|'.join(WEIGHTS)})(?:\.((?:(?!-\d+-of-)[^.])+))?\.safetensors(\.index(?:\.([^.]+))?\.json)?"
)


def variants(folder: Path) -> dict[str, Path]:
    """By variant ("" is the plain one), the file of weights or the index of its shards; an index goes first."""
    found: dict[str, Path] = {}
    names = [match for path in folder.glob("*.safetensors*") if (match := WEIGHT_NAME.fullmatch(path.name))]
    for match in sorted(names, key=lambda match: (match[1], match[3] is None)):
        found.setdefault(match[2] or match[4] or "", folder / match.string)
    return found


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names. Raises ErasecError where it is damaged or one of them is not there."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasecError(f"{index.name} is no index of shards", why=repr(error), where=str(index)) from error
    if lost := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        raise ErasecError(
            f"the weights are not whole: {lost[0]} is not there", why=f"{index.name} names {len(names)} shards",
            fix="fetch the missing files", where=str(index.parent),
        )  # fmt: skip
    return tuple(index.parent / name for name in names)


@dataclass(frozen=True)
class Folder:
    """A diffusers folder: model_index.json and a subfolder per component. Nothing is read until it is asked for.

    ``variant`` chooses among a component's weights, such as "fp16"; a component without it has its plain ones taken.
    """

    root: Path
    variant: str = ""

    @cached_property
    def index(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((self.root / "model_index.json").read_text())
        return index

    def files(self) -> tuple[Path, ...]:
        """Every file of the folder, relative, sorted; hidden ones (caches, locks) left out."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return tuple(sorted(path for path in found if not any(part.startswith(".") for part in path.parts)))

    def prepare(self) -> None:
        """Make what a build will need and is not there; a folder has it all."""

    def size(self) -> int:
        """Bytes of all its files."""
        return sum((self.root / name).stat().st_size for name in self.files())

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.root / component / name).read_text())
        return config

    def weights(self, component: str) -> Path:
        """The file of a component's weights, or the index of its shards. Raises ErasecError where none can be chosen.

        Without ``variant`` the plain ones, or else those of the only variant there is.
        """
        folder = self.root / component
        found = variants(folder)
        if self.variant and not any(self.variant in variants(path) for path in self.root.glob("*/")):
            raise ErasecError(
                f"no component has the variant {self.variant!r}", where=str(self.root),
                why=f"{component} has: {', '.join(name or 'the plain one' for name in found) or 'no safetensors'}",
            )  # fmt: skip
        only = next(iter(found.values())) if len(found) == 1 and not self.variant else None
        if chosen := found.get(self.variant) or found.get("") or only:
            return chosen
        raise self._no_weights(folder, sorted(found))

    def variant_of(self, component: str) -> str:
        """The variant that is taken of a component's weights; "" for the plain ones."""
        chosen = self.weights(component)
        return next(name for name, path in variants(self.root / component).items() if path == chosen)

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The safetensors files that hold a component's weights. Raises ErasecError where there are only pickles."""
        chosen = self.weights(component)
        return _shards(chosen) if chosen.suffix == ".json" else (chosen,)

    def _no_weights(self, folder: Path, names: list[str]) -> ErasecError:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why, fix = "it has no weights", "fetch or save the model with safetensors: pipe.save_pretrained(DIR)"
        if names:
            why = f"it has only variants ({', '.join(names)})"
            fix = f'choose one: variant = "{names[0]}" in the recipe, or --variant {names[0]}'
        elif pickles:
            why = f"it has only pickled weights ({', '.join(pickles)}), which can run code when opened"
            fix = "pass --allow-pickle (only tensors are read, nothing is run), or save it again with safetensors"
        return ErasecError(f"no safetensors weights for {folder.name}", why=why, fix=fix, where=str(folder))

    def entries(self, component: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for file in self.weight_files(component):
            entries = read_header(file)[0]
            if twice := found.keys() & entries.keys():
                raise ErasecError(
                    f"{component} has {min(twice)} twice", why=f"in {found[min(twice)].file.name} and in {file.name}",
                    where=str(file.parent), fix="fetch the model again",
                )  # fmt: skip
            found |= entries
        return found

    def doubles(self, components: Iterable[str]) -> tuple[Path, ...]:
        """Relative paths of further copies of these components' weights: other precisions, pickles, single files."""
        used = {file.relative_to(self.root) for name in components for file in self.weight_files(name)}
        used |= {self.weights(name).relative_to(self.root) for name in components}
        folders = {Path(), *(Path(component) for component in components)}
        return tuple(
            name
            for name in self.files()
            if name.parent in folders and name not in used and "optimizer" not in name.name and name != Path(CARRIED)
            and (name.suffix in COPIES or (".index." in name.name and name.suffix == ".json"))
        )  # fmt: skip

    def placed(self, changed: Changed) -> dict[Path, dict[str, Callable[[], Tensor]]]:
        """``changed[component][key]`` by the file that holds each tensor, and its key there."""
        placed: dict[Path, dict[str, Callable[[], Tensor]]] = {}
        for component, tensors in changed.items():
            entries = self.entries(component)
            for key, make in tensors.items():
                placed.setdefault(entries[key].file, {})[key] = make
        return placed

    def write(self, out: Path, changed: Changed, link: bool = False) -> None:
        """Copy the folder to ``out`` with tensors replaced, ``changed[component][key]``; other files byte for byte.

        ``doubles`` of the changed components are left out: they would bring back what was edited. With ``link``, other
        files are hard links where the file system allows it. Raises ErasecError where ``out`` is this folder.
        """
        if out.resolve() == self.root.resolve():
            raise ErasecError(f"{out} is the model itself", why="it would be overwritten", fix="give another folder")
        patched = self.placed(changed)
        names = sorted(set(self.files()) - set(self.doubles(changed)))
        with bar("write", len(names)) as advance:
            for name in names:
                source, target = self.root / name, out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source in patched:
                    patch(source, target, patched[source])
                else:
                    (hard_link if link else copy)(source, target)
                advance(note=name.name)
