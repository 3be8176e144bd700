"""Token ids are those of transformers' CLIPTokenizer, whichever files the tokenizer came in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

from erasec.errors import ErasecError
from erasec.ldm.skeleton import write_tokenizer
from erasec.model import loading
from erasec.model.text_encoders import fitting_part
from erasec.runtime.clip_tokenizer import load_tokenizer

TEXTS = [
    "",
    "a star",
    "A  Photo\tof\n a DOG's   café 3.14 — don't!! <|endoftext|> x",
    "日本語 😀 <|startoftext|> hi",
    "cafe\u0301 <|ENDOFTEXT|> yes",
    "!!!!! wow! a!b",
    "very " * 100,
    "naïve Ünïcode ½ ①² a_b_c  ",
    "\u0130stanbul ß",
    "<new> cat <new>dog <NEW>",
    "portrait of a woman, by greg rutkowski, trending on artstation, 8k --ar 16:9",
    "A man riding a wave on top of a surfboard.",
    "((masterpiece:1.2)), [blurry], {neon|lights}",
]
BEGIN = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
END = BEGIN | {"content": "<|endoftext|>"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of Stable Diffusion 1: vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    return folder


def test_the_part_that_is_read_is_that_of_transformers(clip: Path) -> None:
    ours, theirs = load_tokenizer(clip, 77), CLIPTokenizer.from_pretrained(clip)
    for text in (*TEXTS, "a star " * 37 + "a", "a star " * 37 + "a ring", "naïve 日本語 " * 30):
        read = ours.text_read(text)
        assert text.startswith(read)
        assert read == fitting_part(theirs, text, 77)
        assert np.array_equal(ours.ids([read])[:, :75], ours.ids([text])[:, :75])  # a cut may lie inside a word
        assert (read == text) is (len(theirs(text).input_ids) <= 77)


def edit(file: Path, **more: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | more))


def plain(folder: Path) -> None:
    """As it is."""


def padded(folder: Path) -> None:
    """Stable Diffusion 2's, padded with an exclamation mark."""
    write_tokenizer(folder, pad="!")


def saved(folder: Path) -> None:
    """As transformers 5 saves it: tokenizer.json."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()


def old(folder: Path) -> None:
    """As transformers 4 did for a slow tokenizer: special tokens with options, new ones in a file of their own."""
    edit(folder / "added_tokens.json", **{"<new>": 49408})
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END}
    edit(folder / "special_tokens_map.json", **special)
    edit(folder / "tokenizer_config.json", **{key: {"__type": "AddedToken", **token} for key, token in special.items()})


def decoder(folder: Path) -> None:
    """As transformers 4 did later: all of them in tokenizer_config.json."""
    mark = BEGIN | {"content": "!", "normalized": False}
    tokens = {"49406": BEGIN, "49407": END, "0": mark, "49408": BEGIN | {"content": "<new>", "special": False}}
    entries = {number: {"special": True, **token} for number, token in tokens.items()}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=entries, pad_token="!")


@pytest.mark.parametrize("change", [plain, padded, saved, old, decoder])
def test_ids_are_those_of_transformers(clip: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(clip, folder)
    change(folder)
    theirs = CLIPTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=77, truncation=True
    ).input_ids
    ours = load_tokenizer(folder, 77)
    np.testing.assert_array_equal(ours.ids(TEXTS), np.array(theirs))
    assert ours.ids([]).size == 0
    assert ours.knows("dog</w>") and ours.knows("<new>") is (change in (saved, old, decoder))


def test_ids_of_glyphs_and_of_other_lengths() -> None:
    folder = loading.bundled_folder("glyphs") / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for positions, length in ((77, 77), (16, 16), (512, 77)):
        theirs = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True).input_ids
        np.testing.assert_array_equal(load_tokenizer(folder, positions).ids(TEXTS), np.array(theirs))


def test_another_vocabulary_gives_other_ids(clip: Path) -> None:
    ours = load_tokenizer(clip, 77)
    glyphs = load_tokenizer(loading.bundled_folder("glyphs") / "tokenizer", 77)
    assert not np.array_equal(ours.ids(["a star"]), glyphs.ids(["a star"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "vocab.json cannot be read"),
        (lambda folder: (folder / "merges.txt").unlink(), "merges.txt cannot be read"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "vocab.json is not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}}"), "tokenizer.json is not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'), "model: it has no 'vocab'"),
        (lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="T5Tokenizer"), "is a T5Tokenizer"),
        (lambda folder: edit(folder / "added_tokens.json", **{"<new>": 49410}), "would not get the id 49410"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    clip: Path, tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(clip, folder)
    change(folder)
    with pytest.raises(ErasecError) as caught:
        load_tokenizer(folder, 77)
    assert words in str(caught.value) and str(folder) in str(caught.value)
