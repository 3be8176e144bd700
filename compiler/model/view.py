"""A checkpoint as passes see it: sites, weights and text states, lazily read and with earlier edits applied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint import pickles
from erasec.checkpoint.folder import CARRIED, Folder
from erasec.checkpoint.safetensors import FLOATS, content_digest, read_tensor
from erasec.errors import ErasecError, nearest
from erasec.family import Family, Site, detect, parameters, sites
from erasec.model import edit as edits_
from erasec.model.edit import Delta, Edit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from erasec.checkpoint.safetensors import Entry
    from erasec.family import Stream
    from erasec.model.text_encoders import Texts, Tokens

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
BUNDLED = ("glyphs", "glyphs-never-star")
# What a pipeline cannot do without, besides weights: one of these files in the component's folder.
SMALL = {"scheduler": ("scheduler_config.json",), "tokenizer": ("vocab.json", "tokenizer.json", "spiece.model")}
HUB = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclass(frozen=True)
class Model:
    """An immutable view of a checkpoint. ``with_edit`` gives a new view; the files stay as they are."""

    family: Family
    source: Folder
    name: str
    revision: str = ""
    edits: tuple[Edit, ...] = ()

    @cached_property
    def _entries(self) -> dict[str, dict[str, Entry]]:
        return {}

    def entries(self, component: str) -> dict[str, Entry]:
        """Where a component's tensors lie; headers are read once, and no tensor."""
        if component not in self._entries:
            self._entries[component] = self.source.entries(component)
        return self._entries[component]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        entries = self.entries(self.family.denoiser)
        return sites(self.family.denoiser, {key: entry.shape for key, entry in entries.items()})

    @cached_property
    def parameters(self) -> tuple[Site, ...]:
        """Every floating tensor of the denoiser and the text encoders: what a pass may edit at all."""
        found: list[Site] = []
        for component in (self.family.denoiser, *self.family.text_encoders):
            entries = {key: e.shape for key, e in self.entries(component).items() if e.dtype in FLOATS}
            found += parameters(component, entries, self.family.denoiser)
        return tuple(found)

    def select(self, attn: str, projections: Sequence[str]) -> tuple[Site, ...]:
        """Sites of one kind of attention, such as ``select("cross", "kv")`` or ``select("self", ("q", "out"))``.

        No match is an error.
        """
        found = tuple(site for site in self.sites if site.attn == attn and site.proj in tuple(projections))
        if not found:
            raise ErasecError(f"no site matches attn={attn!r}, proj={projections!r}", why=f"model: {self.name}")
        return found

    def with_edit(self, edit: Edit) -> Model:
        known = set(self.parameters)
        if strange := [site for site in edit.deltas if site not in known]:
            raise ErasecError(f"the edit by {edit.by} changes {strange[0].key}", why=f"{self.name} has no such site")
        if edit.base and edit.base != self.digest:
            raise ErasecError(
                f"the edit by {edit.by} was made for another model", why=f"its base is {edit.base[:12]}...",
                fix=f"solve it again on {self.name} ({self.digest[:12]}...)",
            )  # fmt: skip
        return self._with((*self.edits, edit), (edit,))

    @property
    def original(self) -> Model:
        """The view without any edit; itself, where there is none."""
        return self._with((), self.edits) if self.edits else self

    def _with(self, edits: tuple[Edit, ...], differ: Sequence[Edit]) -> Model:
        view = replace(self, edits=edits)
        # The files are the same, so what was read of them stays valid.
        kept = ["_entries", "sites", "parameters", "streams", "digest", "_digests"]
        text = any(site.component in self.family.text_encoders for edit in differ for site in edit.deltas)
        kept += [] if text else ["_texts"]
        view.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return view

    def deltas(self, site: Site) -> tuple[Delta, ...]:
        return tuple(edit.deltas[site] for edit in self.edits if site in edit.deltas)

    def stored(self, site: Site) -> Tensor:
        """The base's own weight, as stored, (d_out, d_in)."""
        return read_tensor(self.entries(site.component)[site.key])

    def weight(self, site: Site) -> Tensor:
        """The weight with earlier edits, float64 (d_out, d_in), not rounded in between."""
        return edits_.merge(self.stored(site).double(), self.deltas(site))

    def merged(self) -> dict[str, dict[str, Callable[[], Tensor]]]:
        """For every edited tensor, by component and key, a function that gives it merged in its own dtype."""
        changed: dict[str, dict[str, Callable[[], Tensor]]] = {}
        for site in self.parameters:
            if self.deltas(site):
                changed.setdefault(site.component, {})[site.key] = partial(self.merge, site)
        return changed

    def merge(self, site: Site) -> Tensor:
        """The weight as it will be written: with its edits, in its own dtype."""
        return edits_.merge(self.stored(site), self.deltas(site))

    def about(self) -> dict[str, Any]:
        """What an edit file says of its base: enough to know it again by the tensors that the edits change."""
        sites = sorted({site for edit in self.edits for site in edit.deltas})
        return {
            "model": self.name,
            "revision": self.revision,
            "family": self.family.name,
            "sites": {f"{site.component}/{site.key}": self.site_digest(site) for site in sites},
        }

    def site_digest(self, site: Site) -> str:
        """sha256 of the content of one stored tensor."""
        return content_digest({site.key: self.entries(site.component)[site.key]})

    @cached_property
    def digest(self) -> str:
        """sha256 of every component's weights as they are stored: keys, dtypes, shapes and bytes.

        Shards and the order of tensors do not matter; the same weights under other keys are another base.
        """
        import hashlib

        found = hashlib.sha256()
        for component in self.family.components:
            found.update(f"{component} {self.component_digest(component)}\n".encode())
        return found.hexdigest()

    def component_digest(self, component: str) -> str:
        """sha256 of one component's weights as they are stored: keys, dtypes, shapes and bytes."""
        if component not in self._digests:
            self._digests[component] = content_digest(self.entries(component))
        return self._digests[component]

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    @cached_property
    def streams(self) -> dict[str, tuple[Site, ...]]:
        """The sites that read text states, by the stream of states that they read; no tensor is read."""
        return {stream.name: self.select(stream.attn, stream.projections) for stream in self.family.streams}

    @cached_property
    def _texts(self) -> Texts:
        from erasec.model.text_encoders import Texts

        changed = {name: made for name, made in self.merged().items() if name in self.family.text_encoders}
        return Texts(self.source, changed)

    def forget_texts(self) -> None:
        """Let the text encoders go from memory, of this view and those it was made from and into."""
        self._texts.forget()

    def _stream(self, name: str) -> Stream:
        return next(stream for stream in self.family.streams if stream.name == name)

    def last_tokens(self, prompts: Sequence[str], stream: str = "context", part: int = 0) -> Tensor:
        """Index of each prompt's last token before its first end token, (n,), in one part of a stream.

        For the empty prompt it is that of the start token, 0, and -1 for T5, which has none.
        """
        return self._texts.last_tokens(prompts, self._stream(stream).parts[part])

    def encode(self, prompts: Sequence[str], stream: str = "context") -> Tokens:
        """Text states as the denoiser's sites of a stream get them, in float32."""
        return self._texts.encode(prompts, self._stream(stream), self.streams[stream][0].shape[1])


def bundled(name: str) -> Path:
    return Path(str(resources.files("erasec"))) / "glyphs" / "weights" / name


def load(name: str, revision: str | None = None, variant: str = "", allow_pickle: bool = False) -> Model:
    """A model by bundled name, alias, diffusers folder, single file or hub id.

    ``revision`` is a hub commit, tag or branch; a tag or branch is resolved to its commit. ``variant`` chooses among a
    folder's precisions. Pickled weights are read with ``allow_pickle`` alone, and then as tensors only. Raises
    ErasecError that says what to give instead.
    """
    path = Path(name).expanduser()
    if revision and (name in BUNDLED or path.exists()):
        raise ErasecError(
            f"{name} has no revision {revision!r}", why="revisions are those of models on the hub",
            fix="leave out --revision, or give the hub id",
        )  # fmt: skip
    if variant and (name in BUNDLED or path.is_file()):
        raise ErasecError(
            f"{name} has no variant {variant!r}",
            why="variants are those of diffusers folders",
            fix="leave out --variant",
        )
    if name in BUNDLED:
        return _open(Path(bundled(name)), name, "")
    if path.is_dir():
        return _open(path, str(name), "", variant, allow_pickle)
    if path.is_file():
        return _single(path, name, allow_pickle)
    if name.endswith((".safetensors", *PICKLES)):
        raise ErasecError(f"there is no file {name}")
    if name not in HUB and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ErasecError(
            f"there is no model {name!r}", why=nearest(name, (*BUNDLED, *HUB)),
            fix="give a bundled name, an alias, a diffusers folder that exists or a .safetensors file, or a hub id",
        )  # fmt: skip
    return _from_hub(name, HUB.get(name, name), revision, variant, allow_pickle)


def _single(path: Path, name: str, allow_pickle: bool) -> Model:
    from erasec.ldm.single_file import SingleFile

    if path.suffix in PICKLES:
        if not allow_pickle:
            raise ErasecError(
                f"{name} is pickled", why="a pickle can run code when it is opened, and is refused",
                fix="get the .safetensors file; or --allow-pickle, which reads tensors alone and runs nothing",
            )  # fmt: skip
        path = pickles.unpickled(path)
    elif path.suffix != ".safetensors":
        raise ErasecError(f"{name} is no checkpoint", why=f"its ending is {path.suffix or 'missing'}, not .safetensors")
    source = SingleFile(path)
    return Model(detect({key: entry.shape for key, entry in source.entries("unet").items()}), source, name)


def _open(root: Path, name: str, revision: str, variant: str = "", allow_pickle: bool = False) -> Model:
    if not (root / "model_index.json").is_file():
        raise ErasecError(
            f"{name} is no diffusers folder", why="it has no model_index.json", where=str(root),
            fix="give the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/",
        )  # fmt: skip
    if allow_pickle:
        root = pickles.unpickled_folder(root, variant)
    folder = Folder(root, variant)
    denoiser = "transformer" if (root / "transformer").is_dir() else "unet"
    family = detect({key: entry.shape for key, entry in folder.entries(denoiser).items()})
    for component in family.optional:
        if not folder.index.get(component, [None])[0]:
            family = family.without(component)
    for component in family.components:
        folder.weight_files(component)
        if not (root / component / "config.json").is_file():
            raise ErasecError(f"{name} is not whole", why=f"{component}/config.json is missing", where=str(root))
    for part, value in folder.index.items():
        kind = part.rstrip("_0123456789")
        there = any((root / part / file).is_file() for file in SMALL.get(kind, ()))
        if kind in SMALL and isinstance(value, list) and value[0] and not there:
            raise ErasecError(
                f"{name} is not whole", why=f"{part}/{SMALL[kind][0]} is missing", where=str(root),
                fix="fetch the rest of the model: its small files too",
            )  # fmt: skip
    return Model(family, folder, name, revision)


def _from_hub(name: str, repository: str, revision: str | None, variant: str, allow_pickle: bool) -> Model:
    from huggingface_hub import snapshot_download

    # The plain files are always fetched, as parts without the variant have no others; with them those of the variant.
    names = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else []
    patterns = ["*.json", "*.txt", "*.model", CARRIED, "*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors"]
    patterns += ["*/diffusion_pytorch_model*.bin", "*/pytorch_model*.bin"] if allow_pickle else []
    unwanted = [
        name for name in ("*.fp16.*", "*.bf16.*", "*.fp16-*", "*non_ema*") if not variant or variant not in name
    ]
    # The cache first: a pinned revision that is already there needs no network at all.
    error: Exception | None = None
    for local in (True, False):
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        if not local and offline:
            break
        last = offline or not local
        try:
            root = snapshot_download(
                repository, revision=revision, allow_patterns=patterns + names,
                ignore_patterns=[*unwanted, "safety_checker/*"], local_files_only=local,
            )  # fmt: skip
            model = _open(Path(root), name, Path(root).name, variant, allow_pickle)
            _check_precision(model, variant, whole=not last)
            return model
        except ErasecError:
            if last:
                raise
        except Exception as caught:  # the hub client raises a dozen kinds, from three libraries
            error = caught
    raise ErasecError(
        f"the model {repository} is not on this machine and could not be fetched",
        why=f"{type(error).__name__}: {str(error).splitlines()[0] if error and str(error) else 'no network'}",
        fix=f"give a diffusers folder (erasec build ./{name.split('/')[-1]} ...), "
        f"or fetch it where there is a network: hf download {repository}",
    ) from error


def _check_precision(model: Model, variant: str, whole: bool) -> None:
    """Raise ErasecError where what lies in the hub's cache, and not what was asked for, would choose the precision.

    ``whole``: every component must have the variant; otherwise a component may have its plain weights taken.
    """
    allowed = (variant,) if whole else ("", variant)
    for component in model.family.components:
        if (found := model.source.variant_of(component)) not in allowed:
            raise ErasecError(
                f"{model.name} has no {f'{variant} ' if variant else 'plain '}weights of {component} here",
                why=f"it has those of the variant {found!r}" if found else "it has the plain ones",
                fix=f"choose them: --variant {found}" if found else "leave out --variant", where=str(model.source.root),
            )  # fmt: skip
