"""CLIP's tokenizer, read from its files: the same token ids as transformers' CLIPTokenizer, without that library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from erasec.errors import ErasecError

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


@dataclass(frozen=True)
class ClipTokenizer:
    """Encodes texts as rows of ``length`` token ids: a start token, the text, an end token, truncated and padded."""

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


def load_tokenizer(folder: Path, positions: int) -> ClipTokenizer:
    """The tokenizer of a folder, for a text encoder of that many ``positions``.

    The vocabulary is read from tokenizer.json, or else from vocab.json and merges.txt. Raises ErasecError where these
    are missing or damaged, or belong to another tokenizer class.
    """
    try:
        config = _json(folder / "tokenizer_config.json")
        saved = _json(folder / "tokenizer.json")
        kind = str(config.get("tokenizer_class", "CLIPTokenizer"))
        if kind.removesuffix("Fast") != "CLIPTokenizer":
            raise ErasecError(f"the tokenizer is a {kind}", why="only CLIPTokenizer is supported")
        vocabulary, merges = _vocabulary(folder, saved)
        special = {**SPECIAL, **{name: config[name] for name in SPECIAL if config.get(name)}}
        if "added_tokens_decoder" not in config:
            special_map = _json(folder / "special_tokens_map.json")
            special |= {name: special_map[name] for name in SPECIAL if special_map.get(name)}
        tokenizer = _byte_pair_tokenizer(vocabulary, merges, _text(special["unk_token"]))
        _add_tokens(tokenizer, _added_tokens(folder, config, saved), special)
        ids = tokenizer.get_vocab()
        end, start, pad = (_text(special[name]) for name in ("eos_token", "bos_token", "pad_token"))
        tokenizer.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]), False, False)
        length = min(int(config.get("model_max_length") or positions), positions)
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=ids[pad], pad_token=pad)
    except ErasecError as error:
        error.where = error.where or str(folder)
        raise
    except Exception as error:  # the library tokenizers raises plain Exception
        raise ErasecError(
            "the tokenizer cannot be read",
            why=str(error) or repr(error),
            where=str(folder),
            fix="fetch the folder again",
        ) from error
    return ClipTokenizer(tokenizer, length)


def _vocabulary(folder: Path, saved: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges, from the content of tokenizer.json or, where that is empty, vocab.json and merges.txt."""
    if saved:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in saved["model"]["merges"])
        return saved["model"]["vocab"], [(left, right) for left, right in pairs]
    return models.BPE.read_file(str(_existing(folder / "vocab.json")), str(_existing(folder / "merges.txt")))


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


def _added_tokens(
    folder: Path, config: Mapping[str, Any], saved: Mapping[str, Any]
) -> Iterator[tuple[int, AddedToken]]:
    """Tokens in addition to the vocabulary, with their ids, from the file in which the folder's writer put them."""
    if "added_tokens_decoder" in config:
        yield from ((int(number), _token(entry)) for number, entry in config["added_tokens_decoder"].items())
        return
    for text, number in _json(folder / "added_tokens.json").items():
        yield number, AddedToken(text, special=False)
    for entry in saved.get("added_tokens", ()):
        yield entry["id"], _token({key: value for key, value in entry.items() if key != "id"})


def _add_tokens(tokenizer: Tokenizer, added: Iterator[tuple[int, AddedToken]], special: Mapping[str, Any]) -> None:
    """Add tokens in the order of their ids, then the special tokens that are not among them.

    Raises ErasecError where a token would get another id than its own.
    """
    by_id = dict(added)
    tokenizer.add_tokens([by_id[number] for number in sorted(by_id)])
    for number, token in by_id.items():
        if tokenizer.token_to_id(token.content) != number:
            raise ErasecError(
                f"the tokenizer's token {token.content!r} cannot be added",
                why=f"its id would not be {number}",
                fix="save the tokenizer again with save_pretrained",
            )
    known = {token.content for token in by_id.values()}
    # Like transformers: a token given once as text and once with options counts twice, and the later options apply.
    new = {(_text(entry), isinstance(entry, str)): entry for entry in special.values() if _text(entry) not in known}
    tokenizer.add_tokens([_token(entry) for entry in new.values()])


def _token(entry: Any) -> AddedToken:
    """A token from its text, or from its options as JSON holds them."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    return AddedToken(**{"special": True} | {key: value for key, value in entry.items() if key != "__type"})


def _text(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry["content"])


def _json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, {} where there is no such file."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file.name}")
    return file
