"""CLIP's tokenizer, read from its files: the same token ids as transformers' CLIPTokenizer, without that library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from erasec.checkpoint.tokenizer_files import Token, read_tokenizer
from erasec.documents import Source
from erasec.errors import ErasecError, reason, shown

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
OPTIONS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


@dataclass(frozen=True)
class PromptTokenizer:
    """Encodes texts as rows of ``length`` token ids, with start and end tokens, truncated and padded."""

    tokenizer: Tokenizer
    length: int

    def ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (n, length)."""
        return np.array([row.ids for row in self.tokenizer.encode_batch(list(texts))], np.int64)

    def text_read(self, text: str) -> str:
        """The part of ``text`` that fits into ``length`` tokens."""
        encoded = self.tokenizer.encode(text)
        return text[: encoded.offsets[self.length - 2][1]] if encoded.overflowing else text

    def knows(self, token: str) -> bool:
        """Whether the vocabulary has ``token`` as one token."""
        return self.tokenizer.token_to_id(token) is not None


def load_tokenizer(folder: Path, positions: int) -> PromptTokenizer:
    """The tokenizer of a folder, for a text encoder of that many ``positions``.

    The vocabulary is read from tokenizer.json, or else from vocab.json and merges.txt. Raises ErasecError where these
    are missing or damaged, or belong to another tokenizer class.
    """
    files = read_tokenizer(folder)
    settings: dict[str, Any] = {**files.settings}
    kind = str(settings.get("tokenizer_class") or "CLIPTokenizer")
    source = Source("the tokenizer", str(folder), "fetch the folder again")
    if kind.removesuffix("Fast") != "CLIPTokenizer" or not files.vocabulary:
        raise source.error(f"it is a {kind}; only CLIPTokenizer is supported")
    given = {name: value for part in (settings, files.special) for name in SPECIAL if (value := part.get(name))}
    special = {**SPECIAL, **given}
    end, start, pad = (_text(special[name]) for name in ("eos_token", "bos_token", "pad_token"))
    try:
        tokenizer = _byte_pair_tokenizer(files.vocabulary, list(files.merges), _text(special["unk_token"]))
        _add_tokens(tokenizer, files.added, special, source)
        ids = tokenizer.get_vocab()
        tokenizer.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]), False, False)
        length = min(int(settings.get("model_max_length") or positions), positions)
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=ids[pad], pad_token=pad)
    except ErasecError:
        raise
    except Exception as error:  # the library tokenizers raises plain Exception
        raise source.error(reason(error)) from error
    return PromptTokenizer(tokenizer, length)


def _byte_pair_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Tokenizer:
    """CLIP's byte-pair encoding: lower case, words split by ``WORDS``, bytes as letters, and merges of pairs."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown
        )
    )
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def _add_tokens(
    tokenizer: Tokenizer, added: Sequence[tuple[int, str | Token]], special: Mapping[str, Any], source: Source
) -> None:
    """Add tokens in the order of their ids, then the special tokens that are not among them.

    Raises ErasecError where a token would get another id than its own.
    """
    by_id = {
        number: AddedToken(entry, special=False) if isinstance(entry, str) else _token(entry) for number, entry in added
    }
    tokenizer.add_tokens([by_id[number] for number in sorted(by_id)])
    for number, token in by_id.items():
        if tokenizer.token_to_id(token.content) != number:
            raise source.error(f"its token {shown(token.content)} would not get the id {number}")
    known = {token.content for token in by_id.values()}
    # Like transformers: a token given once as text and once with options counts twice, and the later options apply.
    new = {(_text(entry), isinstance(entry, str)): entry for entry in special.values() if _text(entry) not in known}
    tokenizer.add_tokens([_token(entry) for entry in new.values()])


def _token(entry: Any) -> AddedToken:
    """A token from its text, or from its options as JSON holds them."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    return AddedToken(**{"special": True, **{key: value for key, value in entry.items() if key in OPTIONS}})


def _text(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])
