"""CLIP's token ids from a tokenizer's files, as transformers' CLIPTokenizer gives them and without that library."""

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
class Prompts:
    """Turns texts into rows of ``length`` token ids, cut off and padded, each from a start to an end token."""

    tokenizer: Tokenizer
    length: int

    def ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (n, length)."""
        return np.array([row.ids for row in self.tokenizer.encode_batch(list(texts))], np.int64)

    def knows(self, token: str) -> bool:
        """Whether ``token`` is one token here."""
        return self.tokenizer.token_to_id(token) is not None


def read(folder: Path, positions: int) -> Prompts:
    """The tokenizer of a folder, for a text encoder of that many ``positions``.

    Its vocabulary is that of tokenizer.json, or else of vocab.json and merges.txt. Raises ErasecError where they are
    missing or damaged, or another class's.
    """
    try:
        config = _json(folder / "tokenizer_config.json")
        whole = _json(folder / "tokenizer.json")
        kind = str(config.get("tokenizer_class", "CLIPTokenizer"))
        if kind.removesuffix("Fast") != "CLIPTokenizer":
            raise ErasecError(f"the tokenizer is a {kind}", why="CLIPTokenizer is read here")
        vocabulary, merges = _vocabulary(folder, whole)
        special = {**SPECIAL, **{name: config[name] for name in SPECIAL if config.get(name)}}
        if "added_tokens_decoder" not in config:
            more = _json(folder / "special_tokens_map.json")
            special |= {name: more[name] for name in SPECIAL if more.get(name)}
        made = _byte_pairs(vocabulary, merges, _text(special["unk_token"]))
        _add(made, _added(folder, config, whole), special)
        numbers = made.get_vocab()
        end, start, pad = (_text(special[name]) for name in ("eos_token", "bos_token", "pad_token"))
        made.post_processor = processors.RobertaProcessing((end, numbers[end]), (start, numbers[start]), False, False)
        length = min(int(config.get("model_max_length") or positions), positions)
        made.enable_truncation(length)
        made.enable_padding(length=length, pad_id=numbers[pad], pad_token=pad)
    except ErasecError as error:
        error.where = error.where or str(folder)
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ErasecError("the tokenizer cannot be read", why=str(error) or repr(error), where=str(folder)) from error
    return Prompts(made, length)


def _vocabulary(folder: Path, whole: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if whole:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in whole["model"]["merges"])
        return whole["model"]["vocab"], [(left, right) for left, right in pairs]
    return models.BPE.read_file(str(_there(folder / "vocab.json")), str(_there(folder / "merges.txt")))


def _byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Tokenizer:
    """CLIP's way from text to tokens: lower case, words by ``WORDS``, bytes as letters, and pairs of them."""
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown
        )
    )
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def _added(folder: Path, config: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    """Tokens beside the vocabulary with their ids, from whichever file the folder's writer kept them in."""
    if "added_tokens_decoder" in config:
        yield from ((int(number), _token(told)) for number, told in config["added_tokens_decoder"].items())
        return
    for text, number in _json(folder / "added_tokens.json").items():
        yield number, AddedToken(text, special=False)
    for told in whole.get("added_tokens", ()):
        yield told["id"], _token({key: value for key, value in told.items() if key != "id"})


def _add(made: Tokenizer, added: Iterator[tuple[int, AddedToken]], special: Mapping[str, Any]) -> None:
    """Add tokens by their ids, then the special ones that are not among them."""
    numbers = dict(added)
    made.add_tokens([numbers[number] for number in sorted(numbers)])
    for number, token in numbers.items():
        if made.token_to_id(token.content) != number:
            raise ErasecError(
                f"the tokenizer's token {token.content!r} has no place", why=f"its id would not be {number}",
                fix="save the tokenizer again with save_pretrained",
            )  # fmt: skip
    known = {token.content for token in numbers.values()}
    # A token told once as text and once with options counts as two, and the later one's options hold.
    fresh = {(_text(told), isinstance(told, str)): told for told in special.values() if _text(told) not in known}
    made.add_tokens([_token(told) for told in fresh.values()])


def _token(told: Any) -> AddedToken:
    if isinstance(told, str):
        return AddedToken(told, special=True, normalized=False)
    return AddedToken(**{"special": True} | {key: value for key, value in told.items() if key != "__type"})


def _text(told: Any) -> str:
    return told if isinstance(told, str) else str(told["content"])


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _there(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file.name}")
    return file
