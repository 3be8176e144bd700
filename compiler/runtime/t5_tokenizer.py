"""T5's tokenizer, read from tokenizer.json: the same token ids as transformers' T5Tokenizer, without that library."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from erasec.checkpoint.tokenizer_files import SAVED
from erasec.documents import Source
from erasec.errors import reason
from erasec.runtime.clip_tokenizer import PromptTokenizer

PAD = "<pad>"


def load_t5_tokenizer(folder: Path, length: int) -> PromptTokenizer:
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
    return PromptTokenizer(tokenizer, length)
