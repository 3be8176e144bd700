"""Diffusers folders: selecting the files with a component's weights, and copying a folder with tensors replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasec.checkpoint import manifest
from erasec.checkpoint.configs import Config, read_config, read_index
from erasec.checkpoint.safetensors import Entry, copy_file, hard_link, patch_file, read_header
from erasec.documents import read_json
from erasec.errors import ErasecError, shown
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    Changed = Mapping[str, Mapping[str, Callable[[], Tensor]]]  # new tensors by component and key

WEIGHTS = ("diffusion_pytorch_model", "model")
# Suffixes of files that may be further copies of a component's weights, for other libraries and runtimes.
COPIES = (
    ".safetensors",
    ".bin",
    ".ckpt",
    ".pt",
    ".pth",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
    ".data",
    ".xml",
    ".pb",
    ".gguf",
)
CONTENT = ("st_dev", "st_ino", "st_size", "st_mtime_ns")  # what changes when a file is written or replaced
EXTRAS_FILE = "erasec.safetensors"  # what a checkpoint carries in addition to its weights; not a copy of them
# stem[.variant].safetensors, or an index of shards with the variant before "safetensors", or, as older versions of
# transformers and diffusers wrote it, before "json" or "index". Shards themselves do not match.
WEIGHT_NAME = re.compile(
    rf"({'|'.join(WEIGHTS)})(?:\.((?:(?!-\d+-of-)[^.])+))?\.safetensors"
    r"((?:\.(?!index\.)([^.]+))?\.index(?:\.([^.]+))?\.json)?"
)
TRANSFORMER = "joint_attention_dim"  # a key of configs of transformers that UNets and VAEs do not have
PATCH = 2
FLUX_SIDE = 128
SIZES = 6  # numbers that a UNet of Stable Diffusion XL reads of the picture besides the pooled state
SHARD = re.compile(r"-\d+-of-\d+")  # what the name of a shard has in addition to that of a whole file


def variants(folder: Path) -> dict[str, Path]:
    """The weights of a component's folder by variant: one file, or an index of shards, which has precedence.

    "" is the plain variant.
    """
    files: dict[str, Path] = {}
    matches = [match for path in folder.glob("*.safetensors*") if (match := WEIGHT_NAME.fullmatch(path.name))]
    for match in sorted(matches, key=lambda match: (match[1], match[3] is None)):
        files.setdefault(match[2] or match[4] or match[5] or "", folder / match.string)
    return files


def only_variant(root: Path) -> str:
    """The variant that loaders of a diffusers folder must be given, because a component has no plain weights; or ""."""
    stored = [names for path in sorted(root.glob("*/")) if (names := variants(path)) and "" not in names]
    return min(stored, key=len).popitem()[0] if stored else ""


@with_config(ConfigDict(extra="allow"))
class ShardIndex(TypedDict):
    """An index of shards: the file of each tensor."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards lists. Raises ErasecError if it is damaged or a file is missing."""
    names = sorted(set(read_json(index, ShardIndex)["weight_map"].values()))
    if missing := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        raise ErasecError(
            f"the weights are incomplete: {missing[0]} is not there",
            why=f"{index.name} lists {len(names)} shards",
            fix="fetch the missing files",
            where=str(index.parent),
        )
    return tuple(index.parent / name for name in names)


def check_links(root: Path) -> None:
    """Raise ErasecError for a link in a folder to a file outside of it, or to a folder: copying would publish it.

    The files of a model in the hub's cache are links to the blobs of the same repository, and are allowed.
    """
    allowed = _link_targets(root)
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_symlink() or any(part.startswith(".") for part in name.parts):
            continue
        target = Path(os.path.realpath(path))  # which, unlike resolve, accepts a loop of links
        if path.is_dir():
            why = f"it points to the folder {target}, and folders behind links are not copied"
        elif not target.is_relative_to(allowed):
            why = f"it points to {target}, outside of the folder, and would become a part of what is written"
        else:
            continue
        raise ErasecError(
            f"{name} is a link", why=why, where=str(root), fix="put what it points to in its place, or remove the link"
        )


def _link_targets(folder: Path) -> Path:
    """The folder that links in ``folder`` may point into: itself, or in the hub's cache that of its repository."""
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and (path.parent.parent / "blobs").is_dir():
            return path.parent.parent
    return folder


def inside(folder: Path, name: str) -> Path:
    """The path of the file that a document in ``folder`` names: an ONNX file its data, engine.json its engines.

    A missing file is no error here. Raises ErasecError for a path that leaves the folder, by its text or by a link, and
    for what is no regular file, such as a device or a pipe, which would never end.
    """
    path, why = folder / name, ""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        why = "it is no path below the folder"
    elif not (target := Path(os.path.realpath(path))).is_relative_to(_link_targets(folder)):
        why = f"it is a link to {target}, outside of the folder"
    elif path.exists() and not path.is_file():
        why = "it is no regular file"
    if not why:
        return path
    fix = "fetch the folder again, or build it again"
    raise ErasecError(f"{shown(name)} is no file of the folder {folder.name}", why=why, where=str(folder), fix=fix)


def downscale(config: Mapping[str, Any]) -> int:
    """The factor between the resolutions of the first and the lowest level of a UNet or VAE, 8 in Stable Diffusion; the
    side of the patches of latents that a transformer reads."""
    if TRANSFORMER in config:
        return PATCH
    return int(2 ** (len(config["block_out_channels"]) - 1))


def trained_size(denoiser: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents that a denoiser with this config was trained on. The config of FLUX does not say
    it; diffusers' pipeline takes 128."""
    size = (denoiser.get("sample_size") or FLUX_SIDE) if TRANSFORMER in denoiser else denoiser["sample_size"]
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width


def pooled_width(denoiser: Mapping[str, Any]) -> int:
    """The width of the pooled text state that a denoiser with this config reads."""
    if "pooled_projection_dim" in denoiser:
        return int(denoiser["pooled_projection_dim"])
    return int(denoiser["projection_class_embeddings_input_dim"]) - SIZES * int(denoiser["addition_time_embed_dim"])


def head_count(unet: Mapping[str, Any], key: str) -> int:
    """The attention heads of the block of a UNet to which the tensor ``key`` belongs.

    Configs of diffusers name it ``attention_head_dim``, one for all levels or one for each.
    """
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim") or 8
    if isinstance(heads, int):
        return heads
    block = re.match(r"(down|up)_blocks\.(\d+)\.", key)
    levels = list(heads)
    if block is None:
        return int(levels[-1])
    return int(levels[int(block[2])] if block[1] == "down" else levels[-1 - int(block[2])])


@dataclass(frozen=True)
class Folder:
    """A diffusers folder: model_index.json and one subfolder per component. Files are read when they are needed.

    ``variant`` selects among a component's weights, such as "fp16". For a component without that variant, the plain
    weights are used.
    """

    root: Path
    variant: str = ""

    @cached_property
    def index(self) -> Config:
        return read_index(self.root)

    def files(self) -> tuple[Path, ...]:
        """The relative paths of all files, sorted, except for hidden ones (caches, locks) and the folder's manifest."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        paths = (path for path in paths if path != Path(manifest.FILE))
        return tuple(sorted(path for path in paths if not any(part.startswith(".") for part in path.parts)))

    def read_files(self) -> tuple[Path, ...]:
        """The files from which the result of a command is made."""
        return tuple(self.root / name for name in self.files())

    def watch(self) -> None:
        """Remember the state of all files, for ``changes``."""
        self._states  # noqa: B018

    @cached_property
    def _states(self) -> dict[Path, os.stat_result]:
        return {path: path.stat() for path in self.read_files()}

    def changes(self) -> tuple[set[Path], set[Path]]:
        """The files that were written or replaced since ``watch``; and those of which only the status has changed, as
        by chmod, or by a program that sets the time of a file back."""
        written, touched = set[Path](), set[Path]()
        for path, old in self._states.items():
            new = path.stat() if path.is_file() else None
            if new is None or any(getattr(new, name) != getattr(old, name) for name in CONTENT):
                written.add(path)
            elif new.st_ctime_ns != old.st_ctime_ns and new.st_nlink == old.st_nlink:
                touched.add(path)
        return written, touched

    def prepare(self) -> None:
        """Write the files that a build needs and that are missing. A folder has all of them."""

    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.root / name).stat().st_size for name in self.files())

    def config(self, component: str, name: str = "config.json") -> Config:
        """The config of a component, or another JSON file of it. Raises ErasecError."""
        return read_config(self.root, component, name)

    def weights(self, component: str) -> Path:
        """The file with a component's weights, or the index of its shards.

        These are the weights of ``variant``, else the plain ones, else those of the only variant. Raises ErasecError if
        there are none, or several variants to choose from.
        """
        folder = self.root / component
        available = variants(folder)
        if self.variant and not any(self.variant in variants(path) for path in self.root.glob("*/")):
            raise ErasecError(
                f"no component has the variant {self.variant!r}",
                where=str(self.root),
                why=f"{component} has: {', '.join(name or 'the plain one' for name in available) or 'no safetensors'}",
            )
        only = next(iter(available.values())) if len(available) == 1 and not self.variant else None
        if chosen := available.get(self.variant) or available.get("") or only:
            return chosen
        raise self._no_weights(folder, sorted(available))

    def variant_of(self, component: str) -> str:
        """The variant of a component's weights that is used; "" for the plain ones."""
        chosen = self.weights(component)
        return next(name for name, path in variants(self.root / component).items() if path == chosen)

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The safetensors files with a component's weights. Raises ErasecError as ``weights`` does."""
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
        """The entries of a component's tensors by name. Raises ErasecError if two shards contain the same tensor."""
        entries: dict[str, Entry] = {}
        for file in self.weight_files(component):
            shard = read_header(file)[0]
            if duplicates := entries.keys() & shard.keys():
                raise ErasecError(
                    f"{component} has {min(duplicates)} twice",
                    why=f"in {entries[min(duplicates)].file.name} and in {file.name}",
                    where=str(file.parent),
                    fix="fetch the model again",
                )
            entries |= shard
        return entries

    def other_copies(self, components: Iterable[str]) -> tuple[Path, ...]:
        """Relative paths of further copies of these components' weights: other precisions, pickles, single files."""
        used = {file.relative_to(self.root) for name in components for file in self.weight_files(name)}
        used |= {self.weights(name).relative_to(self.root) for name in components}
        folders = {Path(), *(Path(component) for component in components)}
        return tuple(
            name
            for name in self.files()
            if name.parent in folders
            and name not in used
            and "optimizer" not in name.name
            and name != Path(EXTRAS_FILE)
            and (name.suffix in COPIES or (".index." in name.name and name.suffix == ".json"))
        )

    def by_file(self, changed: Changed) -> dict[Path, dict[str, Callable[[], Tensor]]]:
        """Group ``changed[component][key]`` by the file that stores each tensor, and by its name in that file."""
        placed: dict[Path, dict[str, Callable[[], Tensor]]] = {}
        for component, tensors in changed.items():
            entries = self.entries(component)
            for key, make in tensors.items():
                placed.setdefault(entries[key].file, {})[key] = make
        return placed

    def write(self, out: Path, changed: Changed, link: bool = False) -> None:
        """Copy the folder to ``out`` with the tensors ``changed[component][key]`` replaced. All other bytes are copied.

        ``other_copies`` of the changed components are left out, because they contain the unedited weights. With
        ``link``, unchanged files become hard links if the file system supports them. Raises ErasecError if ``out`` is
        this folder.
        """
        if out.resolve() == self.root.resolve():
            raise ErasecError(f"{out} is the model itself", why="it would be overwritten", fix="give another folder")
        patched = self.by_file(changed)
        names = sorted(set(self.files()) - set(self.other_copies(changed)))
        with bar("write", len(names)) as advance:
            for name in names:
                source, target = self.root / name, out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source in patched:
                    patch_file(source, target, patched[source])
                else:
                    (hard_link if link else copy_file)(source, target)
                advance(note=name.name)
