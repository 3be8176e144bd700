"""Text states as a family's denoiser gets them: tokenizers and encoders, read from a checkpoint when first asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erasec.checkpoint.safetensors import read_tensor
from erasec.errors import ErasecError
from erasec.progress import bar, hush

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Changed, Folder
    from erasec.family import Part, Stream

BATCH = 64 * 77  # tokens
# What a text encoder may be, with the class of its tokenizer.
ENCODERS = {
    "CLIPTextModel": "CLIPTokenizer", "CLIPTextModelWithProjection": "CLIPTokenizer", "T5EncoderModel": "T5Tokenizer",
}  # fmt: skip
TIED = ("shared.weight", "encoder.embed_tokens.weight")


@dataclass(frozen=True)
class Tokens:
    """Encoded prompts, part by part: states (n, t, d) in float32, and the index (n,) of each prompt's last token before
    its first end token."""

    parts: tuple[Tensor, ...]
    lasts: tuple[Tensor, ...]

    @property
    def states(self) -> Tensor:
        """All rows as the denoiser gets them, (n, t, d)."""
        return torch.cat(self.parts, 1) if len(self.parts) > 1 else self.parts[0]

    @property
    def last(self) -> Tensor:
        """The indices in the first part, (n,)."""
        return self.lasts[0]


@dataclass(frozen=True)
class Texts:
    """The text half of a checkpoint; encoders that were read stay in memory until ``forget``.

    ``changed`` are new tensors by encoder and key, as edits of it make them.
    """

    source: Folder
    changed: Changed = field(default_factory=dict)
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _encoders: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self, encoder: str) -> Any:
        """The tokenizer of a text encoder: text_encoder_2 reads what tokenizer_2 makes."""
        if encoder not in self._tokenizers:
            import transformers

            hush()
            kind = getattr(transformers, ENCODERS[architecture(self.source, encoder)])
            folder = self.source.root / encoder.replace("text_encoder", "tokenizer")
            self._tokenizers[encoder] = kind.from_pretrained(folder)
        return self._tokenizers[encoder]

    def encoder(self, name: str) -> Any:
        """The encoder in float32, its weights read tensor by tensor. Raises ErasecError where some are missing."""
        if name not in self._encoders:
            self._encoders[name] = load_encoder(self.source, name, self.changed.get(name, {}))
        return self._encoders[name]

    def forget(self) -> None:
        """Let the encoders go; they are read again when asked for."""
        self._encoders.clear()

    def ids(self, prompts: Sequence[str], encoder: str, length: int = 0) -> Tensor:
        """Token ids (n, length), cut off and padded; the tokenizer's own length where it is 0."""
        tokenizer = self.tokenizer(encoder)
        length = length or tokenizer.model_max_length
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids
        return ids

    def last_tokens(self, prompts: Sequence[str], part: Part) -> Tensor:
        """Index of each prompt's last token before its first end token, (n,).

        For the empty prompt it is that of the start token, 0, and -1 for T5, which has none.
        """
        encoder = part.encoders[0]
        ends: Tensor = self.ids(prompts, encoder, part.length) == self.tokenizer(encoder).eos_token_id
        # A prompt that was cut off has its end token at the last place, so there is always one.
        last: Tensor = ends.int().argmax(1) - 1
        return last

    def encode(self, prompts: Sequence[str], stream: Stream, width: int) -> Tokens:
        """States of a stream that is read by sites ``width`` wide. Raises ErasecError where its states are not so."""
        return Tokens(
            tuple(self._rows(prompts, part, width) for part in stream.parts),
            tuple(self.last_tokens(prompts, part) for part in stream.parts),
        )

    def _rows(self, prompts: Sequence[str], part: Part, width: int) -> Tensor:
        rows = torch.cat([self._states(prompts, name, part) for name in part.encoders], 2)
        room = width - rows.shape[2]
        if room < 0 or (room and not part.padded):
            names = " and ".join(part.encoders)
            raise ErasecError(
                f"the denoiser reads text states {width} wide, those of {names} are {rows.shape[2]}",
                why="these components are not of one model", where=str(self.source.root),
            )  # fmt: skip
        return torch.nn.functional.pad(rows, (0, room)) if room else rows

    def _states(self, prompts: Sequence[str], name: str, part: Part) -> Tensor:
        """One encoder's states (n, t, d), as the part wants them; t is 1 for pooled ones."""
        model, ids, found = self.encoder(name), self.ids(prompts, name, part.length), []
        with torch.no_grad(), bar("encode", len(prompts)) as advance:
            for batch in ids.split(max(1, BATCH // ids.shape[1])):
                if part.state == "penultimate":
                    states = model(batch, output_hidden_states=True).hidden_states[-2]
                elif part.state == "pooled":
                    out = model(batch)
                    states = (out.text_embeds if "text_embeds" in out else out.pooler_output)[:, None]
                else:
                    states = model(batch).last_hidden_state
                found.append(states.float())
                advance(len(batch))
        return torch.cat(found)


def architecture(source: Folder, name: str) -> str:
    """The class of a text encoder, by its config. Raises ErasecError for one that is not known here."""
    kind: str = source.config(name).get("architectures", ["CLIPTextModel"])[0]
    if kind not in ENCODERS:
        raise ErasecError(f"{name} is a {kind}", why=f"known: {', '.join(ENCODERS)}", where=str(source.root))
    return kind


def load_encoder(source: Folder, name: str, changed: Mapping[str, Callable[[], Tensor]] | None = None) -> Any:
    """A text encoder from a checkpoint's config and tensors, float32, whatever the files' layout or dtype.

    ``changed`` gives new tensors by the keys of the files.
    """
    import transformers

    hush()
    kind = getattr(transformers, architecture(source, name))
    config = kind.config_class(**_plain(source.config(name)))
    with torch.device("meta"):
        model = kind(config)
    wanted = {_bare(key): key for key in model.state_dict()}
    entries = {_bare(key): entry for key, entry in source.entries(name).items()}
    for one, other in (TIED, TIED[::-1]):  # T5 holds its token embeddings by two names; files may have either or both
        if one in wanted and one not in entries and other in entries:
            entries[one] = entries[other]
    if missing := sorted(set(wanted) - set(entries)):
        raise ErasecError(
            f"{name} has no tensor {missing[0]}", where=str(source.root),
            why=f"{len(missing)} of {len(wanted)} that its config asks for are missing",
        )  # fmt: skip
    made = {_bare(key): make for key, make in (changed or {}).items()}
    state = {
        key: (made[bare]() if bare in made else read_tensor(entries[bare])).float() for bare, key in wanted.items()
    }
    model.load_state_dict(state, assign=True)
    for module in model.modules():  # what is computed and not stored was made on no device
        ids = module._buffers.get("position_ids")
        if ids is not None and ids.is_meta:
            module._buffers["position_ids"] = torch.arange(ids.shape[-1])[None]
    return model.eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}


def _bare(key: str) -> str:
    # transformers 5 has dropped this prefix from the names that it writes; both are found.
    return key.removeprefix("text_model.")
