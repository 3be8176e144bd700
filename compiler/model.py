"""A checkpoint as passes see it: sites, weights and text states, lazily read and with earlier edits applied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec import edit as edits_
from erasec.checkpoint import Folder, content_digest, read_tensor
from erasec.edit import Delta, Edit
from erasec.errors import ErasecError, nearest
from erasec.family import Family, Site, detect, sites
from erasec.progress import hush

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BUNDLED = ("glyphs", "glyphs-never-star")
HUB = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclass(frozen=True)
class Tokens:
    """Encoded prompts. ``states`` (n, 77, d) float32; ``last`` (n,) index of the last token before the first EoT."""

    states: Tensor
    last: Tensor


@dataclass(frozen=True)
class Model:
    """An immutable view of a checkpoint. ``with_edit`` gives a new view; the files stay as they are."""

    family: Family
    source: Folder
    name: str
    revision: str = ""
    edits: tuple[Edit, ...] = ()

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        entries = self.source.entries(self.family.denoiser)
        return sites(self.family.denoiser, {key: entry.shape for key, entry in entries.items()})

    def select(self, attn: str, projections: Sequence[str]) -> tuple[Site, ...]:
        """Sites of one kind of attention, such as ``select("cross", "kv")`` or ``select("self", ("q", "out"))``.

        No match is an error.
        """
        found = tuple(site for site in self.sites if site.attn == attn and site.proj in tuple(projections))
        if not found:
            raise ErasecError(f"no site matches attn={attn!r}, proj={projections!r}", why=f"model: {self.name}")
        return found

    def with_edit(self, edit: Edit) -> Model:
        known = set(self.sites)
        if strange := [site for site in edit.deltas if site not in known]:
            raise ErasecError(f"the edit by {edit.by} changes {strange[0].key}", why=f"{self.name} has no such site")
        if edit.base and edit.base != self.digest:
            raise ErasecError(
                f"the edit by {edit.by} was made for another model", why=f"its base is {edit.base[:12]}...",
                fix=f"solve it again on {self.name} ({self.digest[:12]}...)",
            )  # fmt: skip
        view = replace(self, edits=(*self.edits, edit))
        # The files are the same, so what was read of them stays valid.
        kept = ("sites", "digest", "_text")
        view.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return view

    def deltas(self, site: Site) -> tuple[Delta, ...]:
        return tuple(edit.deltas[site] for edit in self.edits if site in edit.deltas)

    def stored(self, site: Site) -> Tensor:
        """The base's own weight, as stored, (d_out, d_in)."""
        return read_tensor(self.source.entries(site.component)[site.key])

    def weight(self, site: Site) -> Tensor:
        """The weight with earlier edits, float64 (d_out, d_in), not rounded in between."""
        return edits_.merge(self.stored(site).double(), self.deltas(site))

    def merged(self) -> dict[str, dict[str, Callable[[], Tensor]]]:
        """For every edited tensor, by component and key, a function that gives it merged in its own dtype."""
        changed: dict[str, dict[str, Callable[[], Tensor]]] = {}
        for site in self.sites:
            if self.deltas(site):
                changed.setdefault(site.component, {})[site.key] = partial(self._merge, site)
        return changed

    def _merge(self, site: Site) -> Tensor:
        return edits_.merge(self.stored(site), self.deltas(site))

    @cached_property
    def digest(self) -> str:
        """sha256 of the content of every component's weights: the base's identity, whatever its files look like."""
        import hashlib

        found = hashlib.sha256()
        for component in self.family.components:
            found.update(f"{component} {content_digest(self.source.entries(component))}\n".encode())
        return found.hexdigest()

    @cached_property
    def _text(self) -> tuple[Any, Any]:
        import torch
        from transformers import CLIPTextModel, CLIPTokenizer

        hush()
        if len(self.family.text_encoders) > 1:
            raise ErasecError(
                f"text states of {self.family.name} are not supported yet", why="it has two text encoders"
            )
        root = self.source.root
        tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(root / "text_encoder", dtype=torch.float32, use_safetensors=True)
        return tokenizer, encoder.eval()

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        tokenizer = self._text[0]
        length = tokenizer.model_max_length
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids
        return ids

    def last_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Index of each prompt's last token before its first end token, (n,); 0, the start token, for an empty one."""
        first_end: Tensor = (self._ids(prompts) == self._text[0].eos_token_id).int().argmax(1)
        return first_end - 1

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Text states as the denoiser's cross-attention gets them, in float32."""
        import torch

        with torch.no_grad():
            states = [self._text[1](ids).last_hidden_state.float() for ids in self._ids(prompts).split(64)]
        return Tokens(torch.cat(states), self.last_tokens(prompts))


def bundled(name: str) -> Path:
    return Path(str(resources.files("erasec"))) / "glyphs" / "weights" / name


def load(name: str, revision: str | None = None) -> Model:
    """A model by bundled name, alias, diffusers folder or hub id. Raises ErasecError that says what to give instead.

    ``revision`` is a hub commit, tag or branch; a tag or branch is resolved to its commit.
    """
    if name in BUNDLED:
        return _open(Path(bundled(name)), name, "")
    path = Path(name).expanduser()
    if path.is_dir():
        return _open(path, str(name), "")
    if path.is_file() or name.endswith((".safetensors", ".ckpt", ".bin", ".pt")):
        pickled = not name.endswith(".safetensors")
        raise ErasecError(
            f"{name} is a single file" if path.is_file() else f"there is no file {name}",
            why="pickled weights can run code when opened and are refused" if pickled
            else "single-file checkpoints are not read yet; a diffusers folder is",
            fix="StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR), then erasec build DIR",
        )  # fmt: skip
    if name not in HUB and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ErasecError(
            f"there is no model {name!r}", why=nearest(name, (*BUNDLED, *HUB)),
            fix="give a bundled name, an alias, a diffusers folder that exists, or a hub id such as owner/model",
        )  # fmt: skip
    return _from_hub(name, HUB.get(name, name), revision)


def _open(root: Path, name: str, revision: str) -> Model:
    if not (root / "model_index.json").is_file():
        raise ErasecError(
            f"{name} is no diffusers folder", why="it has no model_index.json", where=str(root),
            fix="give the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/",
        )  # fmt: skip
    folder = Folder(root)
    family = detect({key: entry.shape for key, entry in folder.entries("unet").items()})
    for component in family.components:
        folder.weight_files(component)
        if not (root / component / "config.json").is_file():
            raise ErasecError(f"{name} is not whole", why=f"{component}/config.json is missing", where=str(root))
    return Model(family, folder, name, revision)


def _from_hub(name: str, repository: str, revision: str | None) -> Model:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors"]
    # The cache first: a pinned revision that is already there needs no network at all.
    error: Exception | None = None
    for local in (True, False):
        if not local and os.environ.get("HF_HUB_OFFLINE") == "1":
            break
        try:
            root = snapshot_download(
                repository, revision=revision, allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*non_ema*", "safety_checker/*"], local_files_only=local,
            )  # fmt: skip
            return _open(Path(root), name, Path(root).name)
        except ErasecError:
            if not local or os.environ.get("HF_HUB_OFFLINE") == "1":
                raise
        except Exception as caught:  # the hub client raises a dozen kinds, from three libraries
            error = caught
    raise ErasecError(
        f"the model {repository} is not on this machine and could not be fetched",
        why=f"{type(error).__name__}: {str(error).splitlines()[0] if error and str(error) else 'no network'}",
        fix=f"give a diffusers folder (erasec build ./{name.split('/')[-1]} ...), "
        f"or fetch it where there is a network: hf download {repository}",
    ) from error
