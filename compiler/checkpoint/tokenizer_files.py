"""The files of a tokenizer's folder, read and checked: byte pairs as CLIP has them, or a SentencePiece model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, StringConstraints, with_config
from typing_extensions import TypedDict

from erasec.documents import FETCH, POINTER, Source, read_json, read_text, refuse_pointer
from erasec.errors import ErasecError, shown

CONFIG, SAVED, VOCABULARY, MERGES = "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"
SPECIAL_MAP, ADDED, SENTENCEPIECE = "special_tokens_map.json", "added_tokens.json", "spiece.model"

Id = Annotated[int, Field(ge=0, lt=2**31)]
Digits = Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")]


@with_config(ConfigDict(extra="allow"))
class Token(TypedDict):
    """A token with options."""

    content: str
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    single_word: NotRequired[bool]
    normalized: NotRequired[bool]
    special: NotRequired[bool]


@with_config(ConfigDict(extra="allow"))
class SpecialTokens(TypedDict, total=False):
    """The special tokens that CLIP's tokenizer has, as text or with options."""

    bos_token: str | Token | None
    eos_token: str | Token | None
    unk_token: str | Token | None
    pad_token: str | Token | None


@with_config(ConfigDict(extra="allow"))
class Settings(SpecialTokens, total=False):
    """tokenizer_config.json."""

    tokenizer_class: str | None
    model_max_length: Annotated[int, Field(ge=1)] | Annotated[float, Field(ge=1)] | None
    added_tokens_decoder: dict[Digits, Token]


class _AddedToken(Token):
    id: Id


@with_config(ConfigDict(extra="allow"))
class _BytePairs(TypedDict):
    vocab: dict[str, Id]
    merges: list[str | Annotated[list[str], Field(min_length=2, max_length=2)]]


@with_config(ConfigDict(extra="allow"))
class _Saved(TypedDict):
    model: _BytePairs
    added_tokens: NotRequired[list[_AddedToken]]


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a tokenizer's folder.

    ``vocabulary`` and ``merges`` are from tokenizer.json, or else from vocab.json and merges.txt; both are empty for a
    SentencePiece model, which is not read. ``added`` are tokens in addition to the vocabulary, with their ids and
    options, or their text alone.
    """

    settings: Settings
    vocabulary: dict[str, int] = field(default_factory=dict)
    merges: tuple[tuple[str, str], ...] = ()
    special: SpecialTokens = field(default_factory=lambda: SpecialTokens())
    added: tuple[tuple[int, str | Token], ...] = ()


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The files of a tokenizer's folder. Raises ErasecError where one is missing or damaged."""
    settings = read_json(folder / CONFIG, Settings) if (folder / CONFIG).is_file() else Settings()
    if (folder / SENTENCEPIECE).is_file():
        with (folder / SENTENCEPIECE).open("rb") as stream:
            refuse_pointer(folder / SENTENCEPIECE, stream.read(len(POINTER)))
        return TokenizerFiles(settings)
    own = (folder / SPECIAL_MAP).is_file() and "added_tokens_decoder" not in settings
    special = read_json(folder / SPECIAL_MAP, SpecialTokens) if own else SpecialTokens()
    saved: list[_AddedToken] = []
    if (folder / SAVED).is_file():
        content: Any = read_json(folder / SAVED, dict[str, Any])
        if "vocab" in content.get("model", ()) and isinstance(content["model"]["vocab"], list):
            return TokenizerFiles(settings)  # T5's: pieces with their probabilities, and no merges
        whole = read_json(folder / SAVED, _Saved)
        saved = whole.get("added_tokens", [])
        vocabulary = whole["model"]["vocab"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in whole["model"]["merges"]]
        where = folder / SAVED
    else:
        vocabulary = read_json(folder / VOCABULARY, dict[str, Id])
        lines = (line.removesuffix("\r") for line in read_text(folder / MERGES).split("\n"))
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        where = folder / MERGES
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise _damaged(where, f"{shown(' '.join(wrong))} is no pair of tokens")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise _damaged(where.with_name(VOCABULARY) if where.name == MERGES else where, "two of its tokens have one id")
    merges = tuple((left, right) for left, right in pairs)
    return TokenizerFiles(settings, vocabulary, merges, special, _added(folder, settings, saved))


def _damaged(path: Path, why: str) -> ErasecError:
    return Source(path.name, str(path), FETCH, "is damaged").error(why)


def _added(folder: Path, settings: Settings, saved: list[_AddedToken]) -> tuple[tuple[int, str | Token], ...]:
    """Tokens in addition to the vocabulary, from the file in which the folder's writer put them."""
    if "added_tokens_decoder" in settings:
        return tuple((int(number), token) for number, token in settings["added_tokens_decoder"].items())
    texts = read_json(folder / ADDED, dict[str, Id]) if (folder / ADDED).is_file() else {}
    return (*((number, text) for text, number in texts.items()), *((token["id"], token) for token in saved))


def check_rows(ids: Sequence[int], rows: int, token: Callable[[int], str | None], root: Path) -> None:
    """Raise ErasecError where one of ``ids`` has no row in the text encoder's embedding, which has ``rows``.

    ``token`` returns the text of an id; ``root`` is the folder of the model.
    """
    if (largest := max(ids, default=-1)) >= rows:
        raise ErasecError(
            f"the token {shown(token(largest))} has no row in the text encoder",
            why=f"its id is {largest}, and the embedding has {rows} rows: the two are not of one model",
            where=str(root),
            fix="fetch the model again; or leave out the prompts with this token",
        )
