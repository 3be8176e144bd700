"""What a checkpoint carries beside its weights: memories, new tokens and a negative prompt, in one file of its folder.

Stock loaders pass ``erasec.safetensors`` over and build the model without it; ``erasec.pipeline`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.folder import CARRIED
from erasec.checkpoint.safetensors import read_header, save
from erasec.errors import ErasecError
from erasec.model.edit import Memory, carried, named

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.edit import Edit

FORMAT = 1
KINDS = frozenset({"memory", "tokens", "negative"})


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
        """Which of "memory", "tokens" and "negative" there are, as ``Output.holds`` names them."""
        found = {"memory": self.memories, "tokens": self.tokens, "negative": self.negative}
        return frozenset(name for name, value in found.items() if value)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by its name in the file."""
        return carried(self.memories, self.tokens, self.negative)[0]


def gathered(edits: Iterable[Edit], before: Extras | None = None) -> Extras:
    """All that ``edits`` carry, after what was there ``before``: memories in order, tokens united, negatives joined.

    Raises ErasecError where two edits bring a token of one name.
    """
    extras = before or Extras()
    memories, tokens, negatives = list(extras.memories), dict(extras.tokens), [extras.negative]
    for edit in edits:
        memories += edit.memories
        negatives.append(edit.negative)
        if twice := tokens.keys() & edit.tokens.keys():
            raise ErasecError(
                f"the token {min(twice)!r} is there twice", why=f"the edit by {edit.by} has it, and one before it",
                fix="give one of the two another name",
            )  # fmt: skip
        tokens |= edit.tokens
    return Extras(tuple(memories), tokens, ", ".join(dict.fromkeys(filter(None, negatives))))


def write(root: Path, extras: Extras) -> None:
    """Write ``root/erasec.safetensors``, whole or not at all; the same extras are the same bytes.

    Where there are none, the folder has no such file afterwards.
    """
    if not extras:
        (root / CARRIED).unlink(missing_ok=True)
        return
    tensors, told = carried(extras.memories, extras.tokens, extras.negative)
    content = json.dumps({"format": FORMAT, **told}, sort_keys=True, ensure_ascii=False)
    save(root / CARRIED, tensors, {"erasec.extras": content})


def read(root: Path) -> Extras:
    """The extras of a diffusers folder, none where it has no file of them. Raises ErasecError for a damaged file."""
    path = root / CARRIED
    if not path.is_file():
        return Extras()
    entries, metadata = read_header(path)
    try:
        content = json.loads(metadata["erasec.extras"])
        if content["format"] > FORMAT:
            raise ErasecError(
                f"{CARRIED} has the format {content['format']}", why=f"this erasec knows formats up to {FORMAT}",
                fix="pip install --upgrade erasec", where=str(path),
            )  # fmt: skip
        return Extras(*named(content, entries))
    except (KeyError, TypeError, ValueError) as error:
        raise ErasecError(
            f"{CARRIED} is damaged", why=f"what it says of itself is not what it holds ({error})", where=str(path),
            fix="build the checkpoint again; without this file the model is not the one that was built",
        ) from error  # fmt: skip


def refuse(extras: Extras, holds: frozenset[str], target: str) -> None:
    """Raise ErasecError where ``extras`` have something that the format of ``target`` cannot hold."""
    lost = extras.kinds - holds
    if not lost:
        return
    parts = []
    if "memory" in lost:
        parts.append("memories at " + _listed(dict.fromkeys(memory.attention for memory in extras.memories)))
    if "tokens" in lost:
        parts.append("new tokens " + _listed(extras.tokens))
    if "negative" in lost:
        parts.append(f"the negative prompt {extras.negative!r}")
    raise ErasecError(
        f"{target} cannot hold all of this checkpoint", fix="build it for bundle or onnx: --target bundle",
        why=f"beside its weights it has {'; '.join(parts)}; without them it would be another model",
    )  # fmt: skip


def _listed(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first
