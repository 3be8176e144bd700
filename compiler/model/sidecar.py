"""The extras of a checkpoint: memories, new tokens and a negative prompt, in one file next to its weights.

Other libraries ignore ``erasec.safetensors`` and load the model without it; ``erasec.pipeline`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, with_config

from erasec.checkpoint.folder import EXTRAS_FILE
from erasec.checkpoint.sealed import read_metadata, read_sealed, save_sealed
from erasec.documents import Source
from erasec.errors import ErasecError
from erasec.model.memory import ExtrasRecord, Memory, pack_extras, unpack_extras

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.safetensors import Entry
    from erasec.model.edit import Edit

FORMAT = 1
METADATA = "erasec.extras"
# The kinds of extras, as ``Pass.extras`` and ``Output.extras`` name them, and as messages do.
KIND_NAMES = {"memory": "a memory of its attentions", "tokens": "tokens of its own", "negative": "a negative prompt"}
KINDS = frozenset(KIND_NAMES)


@dataclass(frozen=True, eq=False)
class Extras:
    """``memories`` in their order, ``tokens`` as rows (d) of the embedding by name, and the ``negative`` prompt."""

    memories: tuple[Memory, ...] = ()
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    negative: str = ""

    def __bool__(self) -> bool:
        return bool(self.kinds)

    @property
    def kinds(self) -> frozenset[str]:
        """Which of "memory", "tokens" and "negative" there are."""
        extras = {"memory": self.memories, "tokens": self.tokens, "negative": self.negative}
        return frozenset(kind for kind, value in extras.items() if value)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by its name in the file."""
        return pack_extras(self.memories, self.tokens, self.negative)[0]


def gather_extras(edits: Iterable[Edit], before: Extras | None = None) -> Extras:
    """The extras of all ``edits``, added to those that were there ``before``: all memories in their order, all tokens,
    and the negative prompts joined with commas.

    Raises ErasecError where two edits add a token of the same name.
    """
    extras = before or Extras()
    memories, tokens, negatives = list(extras.memories), dict(extras.tokens), [extras.negative]
    for edit in edits:
        memories += edit.memories
        negatives.append(edit.negative)
        if twice := tokens.keys() & edit.tokens.keys():
            raise ErasecError(
                f"the token {min(twice)!r} is there twice",
                why=f"the edit by {edit.by} adds it, and an earlier edit added it already",
                fix="give one of the two another name",
            )
        tokens |= edit.tokens
    return Extras(tuple(memories), tokens, ", ".join(dict.fromkeys(filter(None, negatives))))


def write_extras(root: Path, extras: Extras) -> None:
    """Write ``root/erasec.safetensors``, or delete it where there are no extras.

    An interrupted write leaves no partial file. The same extras give the same bytes.
    """
    if not extras:
        (root / EXTRAS_FILE).unlink(missing_ok=True)
        return
    tensors, metadata = pack_extras(extras.memories, extras.tokens, extras.negative)
    content = json.dumps({"format": FORMAT, **metadata}, sort_keys=True, ensure_ascii=False)
    save_sealed(root / EXTRAS_FILE, tensors, {METADATA: content})


@with_config(ConfigDict(extra="allow"))
class _Content(ExtrasRecord):
    format: int


def read_record(root: Path) -> tuple[dict[str, Entry], ExtrasRecord]:
    """The tensors and the metadata of the extras of a diffusers folder; empty where it has no such file. No tensor is
    read. Raises ErasecError for a damaged file."""
    path = root / EXTRAS_FILE
    if not path.is_file():
        return {}, {}
    entries, metadata = read_sealed(path, METADATA)
    fix = "build the checkpoint again; deleting this file gives another model than the one that was built"
    source = Source(EXTRAS_FILE, str(path), fix, "is damaged")
    return entries, read_metadata(metadata, METADATA, _Content, FORMAT, source)


def read_extras(root: Path) -> Extras:
    """The extras of a diffusers folder; empty where it has no such file. Raises ErasecError for a damaged file."""
    entries, record = read_record(root)
    return Extras(*unpack_extras(record, entries))


def describe(kinds: Iterable[str]) -> str:
    """The kinds of extras as text for messages."""
    return ", ".join(KIND_NAMES[kind] for kind in sorted(kinds))


def check_supported(extras: Extras, supported: frozenset[str], target: str) -> None:
    """Raise ErasecError where there are extras of a kind that is not ``supported`` by the target named ``target``."""
    lost = extras.kinds - supported
    if not lost:
        return
    parts = []
    if "memory" in lost:
        parts.append("memories at " + _shorten(dict.fromkeys(memory.attention for memory in extras.memories)))
    if "tokens" in lost:
        parts.append("new tokens " + _shorten(extras.tokens))
    if "negative" in lost:
        parts.append(f"the negative prompt {extras.negative!r}")
    raise ErasecError(
        f"{target} cannot hold all of this checkpoint",
        fix="build it for bundle or onnx: --target bundle",
        why=f"besides its weights it has {'; '.join(parts)}; without them it would be another model",
    )


def _shorten(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first
