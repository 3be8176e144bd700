"""T5's tokenizer, read from tokenizer.json: the same token ids as transformers' T5Tokenizer, without that library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from erasec.checkpoint.tokenizer_files import SAVED
from erasec.documents import Source
from erasec.errors import reason

PAD = "<pad>"


@dataclass(frozen=True)
class T5Tokenizer:
    """Encodes texts as rows of ``length`` token ids: the text, an end token, truncated and padded."""

    tokenizer: Tokenizer
    length: int

    def ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (n, length)."""
        return np.array([row.ids for row in self.tokenizer.encode_batch(list(texts))], np.int64)

    def text_read(self, text: str) -> str:
        """The part of ``text`` that fits into ``length`` tokens."""
        encoded = self.tokenizer.encode(text)
        return text[: encoded.offsets[self.length - 2][1]] if encoded.overflowing else text


def load_t5_tokenizer(folder: Path, length: int) -> T5Tokenizer:
    """The tokenizer of a folder, for prompts of ``length`` tokens. Raises ErasecError where tokenizer.json is missing
    or damaged."""
    file = folder / SAVED
    source = Source("the tokenizer", str(folder), "fetch the folder again")
    if not file.is_file():
        raise source.error(f"it has no {SAVED}, which holds T5's vocabulary for every library")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    except Exception as error:  # the library tokenizers raises plain Exception
        raise source.error(reason(error)) from error
    return T5Tokenizer(tokenizer, length)
