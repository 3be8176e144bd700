"""Text states as the denoiser gets them, from the tokenizers and text encoders of a checkpoint, loaded on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.configs import described_by
from erasec.checkpoint.tokenizer_files import check_rows, read_tokenizer
from erasec.documents import read_json
from erasec.errors import ErasecError
from erasec.ldm.tensor_names import TIED
from erasec.model.networks import fill
from erasec.model.threads import fixed_threads
from erasec.progress import bar, disable_library_bars

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Changed, Folder
    from erasec.family import Part, Stream

# Tokens that are encoded at once.
BATCH = 64 * 77
# The classes of text encoders, each with the class of its tokenizer.
ENCODERS = {
    "CLIPTextModel": "CLIPTokenizer",
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5Tokenizer",
}

# The positions of CLIP's text encoders, where the config does not say.
POSITIONS = 77

# The ends of the names of token embeddings, of CLIP and of T5.
EMBEDDINGS = ("token_embedding.weight", *TIED)

# Entries of a config.json that are not parameters of the config's class here. An implementation of attention may be
# code that transformers fetches from the hub.
NOT_PARAMETERS = ("architectures", "attn_implementation", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Tokens:
    """Encoded prompts, by part of their stream: ``parts`` are text states (n, t, d) in float32, and ``lasts`` the
    indices (n,) of each prompt's last token before its first end token."""

    parts: tuple[Tensor, ...]
    lasts: tuple[Tensor, ...]

    @property
    def states(self) -> Tensor:
        """The states of all parts, one after another as the denoiser gets them, (n, t, d)."""
        import torch

        return torch.cat(self.parts, 1) if len(self.parts) > 1 else self.parts[0]

    @property
    def last(self) -> Tensor:
        """The indices of the last tokens in the first part, (n,)."""
        return self.lasts[0]


@dataclass(frozen=True)
class TextEncoders:
    """The tokenizers and text encoders of a checkpoint, loaded on first use and kept in memory until ``release``.

    ``changed`` are edited tensors, by encoder and key; they replace those of the files.
    """

    source: Folder
    changed: Changed = field(default_factory=dict)
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _encoders: dict[str, Any] = field(default_factory=dict)
    _rooms: dict[str, int] = field(default_factory=dict)

    def tokenizer(self, encoder: str) -> Any:
        """The tokenizer of a text encoder; that of text_encoder_2 is in tokenizer_2."""
        if encoder not in self._tokenizers:
            self._tokenizers[encoder] = load_tokenizer(self.source, encoder)
        return self._tokenizers[encoder]

    def encoder(self, name: str) -> Any:
        """A text encoder in float32, with the changed tensors. Raises ErasecError where the files lack a tensor."""
        if name not in self._encoders:
            self._encoders[name] = load_encoder(self.source, name, self.changed.get(name, {}))
        return self._encoders[name]

    def release(self) -> None:
        """Free the memory of the encoders, and forget the tokens that were added; both are loaded again on the next
        use."""
        self._encoders.clear()
        self._tokenizers.clear()

    def ids(self, prompts: Sequence[str], encoder: str, length: int = 0) -> Tensor:
        """Token ids (n, length), truncated and padded. With ``length`` 0 it is the tokenizer's maximum length."""
        tokenizer = self.tokenizer(encoder)
        length = length or tokenizer.model_max_length
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids
        check_rows(ids.flatten().tolist(), self._rows(encoder), tokenizer.convert_ids_to_tokens, self.source.root)
        return ids

    def room(self, encoder: str) -> int:
        """The tokens that an encoder reads of a prompt, start and end token included. The tokenizer is not loaded."""
        if encoder not in self._rooms:
            path = self.source.root / encoder.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
            config = read_json(path, dict[str, Any]) if path.is_file() else {}
            positions = int(self.source.config(encoder).get("max_position_embeddings", POSITIONS))
            self._rooms[encoder] = min(positions, int(config.get("model_max_length") or positions))
        return self._rooms[encoder]

    def text_read(self, text: str, encoder: str, length: int = 0) -> str:
        """The part of ``text`` that an encoder reads: all of it, or the beginning for which it has room.

        A ``length`` above 0 is that of a part of a stream, in tokens; otherwise the encoder's own room counts.
        """
        room = length or self.room(encoder)
        # Each ASCII character is at most one token; two more mark the ends.
        if text.isascii() and len(text) + 2 <= room:
            return text
        return fitting_part(self.tokenizer(encoder), text, room)

    def _rows(self, encoder: str) -> int:
        """The number of rows of an encoder's token embedding, with those that were added if it is loaded; else as the
        header of its file says."""
        if encoder in self._encoders:
            return int(self._encoders[encoder].get_input_embeddings().weight.shape[0])
        entries = self.source.entries(encoder)
        return next((entry.shape[0] for key, entry in entries.items() if key.endswith(EMBEDDINGS)), 2**31)

    def last_tokens(self, prompts: Sequence[str], part: Part) -> Tensor:
        """Index of each prompt's last token before its first end token, (n,).

        For the empty prompt it is 0, the index of the start token; for T5, which has no start token, -1.
        """
        encoder = part.encoders[0]
        ends: Tensor = self.ids(prompts, encoder, part.length) == self.tokenizer(encoder).eos_token_id
        # A truncated prompt has its end token at the last position, so there always is one.
        last: Tensor = ends.int().argmax(1) - 1
        return last

    @fixed_threads()
    def encode(self, prompts: Sequence[str], stream: Stream, width: int, gradients: bool = False) -> Tokens:
        """The text states of prompts in a stream whose sites read vectors of ``width`` entries.

        With ``gradients``, parameters of the encoders that require them get gradients through the states. Raises
        ErasecError where the encoders' states have another width.
        """
        return Tokens(
            tuple(self._part_states(prompts, part, width, gradients) for part in stream.parts),
            tuple(self.last_tokens(prompts, part) for part in stream.parts),
        )

    def _part_states(self, prompts: Sequence[str], part: Part, width: int, gradients: bool) -> Tensor:
        """The states (n, t, width) of one part: those of its encoders side by side, padded with zeros."""
        import torch

        states = torch.cat([self._encoder_states(prompts, name, part, gradients) for name in part.encoders], 2)
        padding = width - states.shape[2]
        if padding < 0 or (padding and not part.padded):
            names = " and ".join(part.encoders)
            raise ErasecError(
                f"the denoiser reads text states {width} wide, those of {names} are {states.shape[2]}",
                why="these components are not of one model",
                where=str(self.source.root),
            )
        return torch.nn.functional.pad(states, (0, padding)) if padding else states

    def _encoder_states(self, prompts: Sequence[str], name: str, part: Part, gradients: bool) -> Tensor:
        """The states (n, t, d) of one encoder, of the kind that the part names; t is 1 for pooled states."""
        import torch

        model, ids = self.encoder(name), self.ids(prompts, name, part.length)
        device = next(model.parameters()).device
        progress = nullcontext(lambda count: None) if gradients else bar("encode", len(prompts))
        batches = []
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()), progress as advance:
            for batch in ids.to(device).split(max(1, BATCH // ids.shape[1])):
                if part.state == "penultimate":
                    states = model(batch, output_hidden_states=True).hidden_states[-2]
                elif part.state == "pooled":
                    out = model(batch)
                    states = (out.text_embeds if "text_embeds" in out else out.pooler_output)[:, None]
                else:
                    states = model(batch).last_hidden_state
                batches.append(states.float())
                advance(len(batch))
        return torch.cat(batches)


def fitting_part(tokenizer: Any, text: str, room: int) -> str:
    """The part of ``text`` that ``room`` tokens of one of transformers' tokenizers hold, the end token included."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= room else text[: offsets[room - 2][1]]


def load_tokenizer(source: Folder, encoder: str = "text_encoder") -> Any:
    """transformers' tokenizer of a text encoder; that of text_encoder_2 is in tokenizer_2.

    Its ``model_max_length`` is at most the number of the encoder's positions. Raises ErasecError for missing or damaged
    files, which transformers would partly accept as an empty list of merges.
    """
    import transformers

    disable_library_bars()
    name = encoder.replace("text_encoder", "tokenizer")
    read_tokenizer(source.root / name)
    tokenizer_class = getattr(transformers, ENCODERS[encoder_class(source, encoder)])
    with described_by(name, source.root):
        tokenizer = tokenizer_class.from_pretrained(source.root / name)
    limit_length(tokenizer, source.config(encoder).get("max_position_embeddings"))
    return tokenizer


def limit_length(tokenizer: Any, positions: int | None) -> None:
    """Let a tokenizer, which may have no limit, make at most as many tokens as its text encoder has ``positions``."""
    tokenizer.model_max_length = int(min(tokenizer.model_max_length, positions or 512))


def encoder_class(source: Folder, name: str) -> str:
    """The name of a text encoder's class, from its config. Raises ErasecError for a class that is not in
    ``ENCODERS``."""
    name_of_class: str = (source.config(name).get("architectures") or ["CLIPTextModel"])[0]
    if name_of_class not in ENCODERS:
        raise ErasecError(f"{name} is a {name_of_class}", why=f"known: {', '.join(ENCODERS)}", where=str(source.root))
    return name_of_class


def load_encoder(source: Folder, name: str, changed: Mapping[str, Callable[[], Tensor]] | None = None) -> Any:
    """A text encoder from the config and tensors of a checkpoint, in float32 whatever the dtype of the files.

    ``changed`` are edited tensors by key; they replace those of the files. Raises ErasecError where the files lack a
    tensor.
    """
    import torch
    import transformers

    disable_library_bars()
    model_class = getattr(transformers, encoder_class(source, name))
    config = {key: value for key, value in source.config(name).items() if key not in NOT_PARAMETERS and key[:1] != "_"}
    with described_by(name, source.root), torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    entries = dict(source.entries(name))
    for missing, present in (TIED, TIED[::-1]):  # files of T5 have its token embedding by one of the names, or by both
        if missing not in entries and present in entries:
            entries[missing] = entries[present]
    fill(model, name, entries, changed or {}, source.root)
    for module in model.modules():  # position ids are computed and not stored, so they are still on the meta device
        ids = module._buffers.get("position_ids")
        if ids is not None and ids.is_meta:
            module._buffers["position_ids"] = torch.arange(ids.shape[-1])[None]
    return model.eval()
