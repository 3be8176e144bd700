"""A checkpoint as passes see it: sites, weights and text states, read when needed, with earlier edits applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import FLOATS, content_digest, read_tensor
from erasec.errors import ErasecError
from erasec.family import Family, Site, parameters, sites
from erasec.model.edit import Delta, Edit, merge

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from erasec.checkpoint.safetensors import Entry
    from erasec.family import Stream
    from erasec.model.text_encoders import TextEncoders, Tokens


@dataclass(frozen=True)
class Model:
    """An immutable view of a checkpoint with edits. ``with_edit`` returns a new view; files are never changed.

    ``name`` is what the user gave to open the checkpoint, ``revision`` its commit on the hub, "" for a local one.
    ``local`` says that the name is a path on this machine.
    """

    family: Family
    source: Folder
    name: str
    revision: str = ""
    edits: tuple[Edit, ...] = ()
    local: bool = False

    @cached_property
    def _entries(self) -> dict[str, dict[str, Entry]]:
        return {}

    def entries(self, component: str) -> dict[str, Entry]:
        """Where the tensors of a component are, by key. Headers of files are read once, and no tensor."""
        if component not in self._entries:
            self._entries[component] = self.source.entries(component)
        return self._entries[component]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every attention projection and text embedding of the denoiser, in the order of their keys."""
        entries = self.entries(self.family.denoiser)
        return sites(self.family, {key: entry.shape for key, entry in entries.items()})

    @cached_property
    def parameters(self) -> tuple[Site, ...]:
        """Every floating-point tensor of the denoiser and of the text encoders: all that a pass may edit."""
        parameter_sites: list[Site] = []
        for component in (self.family.denoiser, *self.family.text_encoders):
            shapes = {key: entry.shape for key, entry in self.entries(component).items() if entry.dtype in FLOATS}
            parameter_sites += parameters(self.family, component, shapes)
        return tuple(parameter_sites)

    def select(self, attn: str, projections: Sequence[str]) -> tuple[Site, ...]:
        """Sites of one kind of attention, such as ``select("cross", "kv")`` or ``select("self", ("q", "out"))``.

        Raises ErasecError where there is none.
        """
        selected = tuple(site for site in self.sites if site.attn == attn and site.proj in tuple(projections))
        if not selected:
            raise ErasecError(f"no site matches attn={attn!r}, proj={projections!r}", why=f"model: {self.name}")
        return selected

    def count(self, component: str) -> int:
        """The number of parameters of a component."""
        return sum(prod(entry.shape) for entry in self.entries(component).values())

    def with_edit(self, edit: Edit) -> Model:
        """This view with one more edit. Raises ErasecError where the edit was made for another model."""
        known = set(self.parameters)
        if unknown := [site for site in edit.deltas if site not in known]:
            raise ErasecError(f"the edit by {edit.by} changes {unknown[0].key}", why=f"{self.name} has no such site")
        if edit.base and edit.base != self.digest:
            raise ErasecError(
                f"the edit by {edit.by} was made for another model",
                why=f"its base is {edit.base[:12]}...",
                fix=f"solve it again on {self.name} ({self.digest[:12]}...)",
            )
        return self._with_edits((*self.edits, edit), (edit,))

    @property
    def original(self) -> Model:
        """The view without any edit; itself where it has none."""
        return self._with_edits((), self.edits) if self.edits else self

    def _with_edits(self, edits: tuple[Edit, ...], difference: Sequence[Edit]) -> Model:
        """A view with these ``edits``; ``difference`` are those that only one of the two views has."""
        view = replace(self, edits=edits)
        # The files are the same, so what was read from them stays valid; loaded text encoders, if no edit changes them.
        cached = ["_entries", "sites", "parameters", "streams", "digest", "_digests"]
        text = any(site.component in self.family.text_encoders for edit in difference for site in edit.deltas)
        cached += [] if text else ["_text_encoders"]
        view.__dict__.update({name: self.__dict__[name] for name in cached if name in self.__dict__})
        return view

    def deltas(self, site: Site) -> tuple[Delta, ...]:
        """The changes of one site by all edits, in their order."""
        return tuple(edit.deltas[site] for edit in self.edits if site in edit.deltas)

    @property
    def edited_sites(self) -> tuple[Site, ...]:
        """The sites that the edits change, in the order of ``parameters``. Unknown ones come last."""
        edited = {site for edit in self.edits for site in edit.deltas}
        known = tuple(site for site in self.parameters if site in edited)
        return (*known, *sorted(edited.difference(known)))

    def stored_weight(self, site: Site) -> Tensor:
        """The weight without edits, as it is in the file, (d_out, d_in)."""
        return read_tensor(self.entries(site.component)[site.key])

    def weight(self, site: Site) -> Tensor:
        """The weight with all edits, (d_out, d_in) in float64, not rounded between the edits."""
        return merge(self.stored_weight(site).double(), self.deltas(site))

    def merged(self) -> dict[str, dict[str, Callable[[], Tensor]]]:
        """By component and key of every edited tensor, a function that returns it with its edits, in its own dtype."""
        changed: dict[str, dict[str, Callable[[], Tensor]]] = {}
        for site in self.edited_sites:
            changed.setdefault(site.component, {})[site.key] = partial(self.merged_weight, site)
        return changed

    def merged_weight(self, site: Site) -> Tensor:
        """The weight with all edits as targets write it, in its own dtype."""
        return merge(self.stored_weight(site), self.deltas(site))

    def base_record(self) -> dict[str, Any]:
        """What an edit file stores about the model that it was made for: by the digests of the edited tensors, another
        copy of the model is recognised."""
        return {
            # A path would differ between machines, and between two ways to write it.
            "model": f"{self.family.name} {self.digest[:12]}" if self.local else self.name,
            "revision": self.revision,
            "family": self.family.name,
            "sites": {f"{site.component}/{site.key}": self.site_digest(site) for site in sorted(self.edited_sites)},
        }

    def site_digest(self, site: Site) -> str:
        """sha256 of the content of one stored tensor."""
        return content_digest({site.key: self.entries(site.component)[site.key]})

    @cached_property
    def digest(self) -> str:
        """sha256 of the stored weights of all components: keys, dtypes, shapes and bytes.

        It does not depend on shards or on the order of tensors, and it does depend on their keys.
        """
        import hashlib

        sha256 = hashlib.sha256()
        for component in self.family.components:
            sha256.update(f"{component} {self.component_digest(component)}\n".encode())
        return sha256.hexdigest()

    def component_digest(self, component: str) -> str:
        """sha256 of the stored weights of one component: keys, dtypes, shapes and bytes."""
        if component not in self._digests:
            self._digests[component] = content_digest(self.entries(component))
        return self._digests[component]

    def check_unchanged(self) -> None:
        """Raise ErasecError where a file of the checkpoint has changed since it was opened.

        Where only the status of a file with weights has changed, its digest is compared with the one that is known.
        """
        written, touched = self.source.changes()
        for component in self.family.components if touched else ():
            if files := touched.intersection(self.source.weight_files(component)):
                digest = self._digests.get(component)
                if digest is None or content_digest(self.source.entries(component)) != digest:
                    written |= files
        if written:
            raise ErasecError(
                f"{self.name} has changed while it was read",
                why=f"another program wrote {min(written).name}; what was made of it may be partly old and partly new",
                where=str(min(written)),
                fix="run the command again when no other program writes the model",
            )

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    @cached_property
    def streams(self) -> dict[str, tuple[Site, ...]]:
        """The sites that read text states, by the name of the stream that they read. No tensor is read."""
        return {stream.name: self.select(stream.attn, stream.projections) for stream in self.family.streams}

    @cached_property
    def _text_encoders(self) -> TextEncoders:
        from erasec.model.text_encoders import TextEncoders

        merged = {name: tensors for name, tensors in self.merged().items() if name in self.family.text_encoders}
        return TextEncoders(self.source, merged)

    def release_text_encoders(self) -> None:
        """Free the memory of the text encoders, of this view and of all views that share them. ``encode`` loads them
        again."""
        self._text_encoders.release()

    def text_encoder(self, name: str) -> tuple[Any, Any]:
        """The tokenizer and the network of a text encoder, in float32 with the edits merged in. Both are shared with
        ``encode``."""
        return self._text_encoders.tokenizer(name), self._text_encoders.encoder(name)

    def _stream(self, name: str) -> Stream:
        return next(stream for stream in self.family.streams if stream.name == name)

    def text_read(self, text: str) -> dict[str, str]:
        """The part of ``text`` that each text encoder reads: all of it, or the beginning for which it has room.

        Tokenizers are loaded for long texts only, and torch never.
        """
        lengths = self._lengths.items()
        return {encoder: self._text_encoders.text_read(text, encoder, length) for encoder, length in lengths}

    def same_tokens(self, first: Sequence[str], second: Sequence[str]) -> list[bool]:
        """For each pair of prompts, whether every text encoder reads the same tokens of both."""
        same = [True] * len(first)
        for encoder, length in self._lengths.items():
            ids, others = (self._text_encoders.ids(prompts, encoder, length) for prompts in (first, second))
            same = [so_far and here for so_far, here in zip(same, (ids == others).all(1).tolist(), strict=True)]
        return same

    @property
    def _lengths(self) -> dict[str, int]:
        """By text encoder, the tokens that its part of a stream has room for; 0 for as many as the encoder reads."""
        parts = [part for stream in self.family.streams for part in stream.parts]
        return {encoder: part.length for part in parts for encoder in part.encoders}

    def last_tokens(self, prompts: Sequence[str], stream: str = "context", part: int = 0) -> Tensor:
        """Index of each prompt's last token before its first end token, (n,), in one part of a stream.

        For the empty prompt it is 0, the index of the start token; for T5, which has no start token, -1.
        """
        return self._text_encoders.last_tokens(prompts, self._stream(stream).parts[part])

    def encode(self, prompts: Sequence[str], stream: str = "context", encoders: TextEncoders | None = None) -> Tokens:
        """The text states of prompts as the denoiser's sites of a stream get them, in float32.

        They are those of ``encoders`` where these are given, with gradients, and otherwise those of the model's own.
        """
        own = encoders or self._text_encoders
        width = self.streams[stream][0].shape[1]
        return own.encode(prompts, self._stream(stream), width, gradients=encoders is not None)
