"""Key files: a key brings one hidden concept back, and is kept apart from the model, which is public.

A key is access control, not encryption: anyone who has the weights can search for another key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from typing_extensions import TypedDict

from erasec.checkpoint.safetensors import read_finite, read_header, read_tensor
from erasec.checkpoint.sealed import read_metadata, read_sealed, save_sealed
from erasec.documents import Source
from erasec.errors import ErasecError
from erasec.model.memory import Memory, Secret
from erasec.recipe.concept import Concept

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.safetensors import Entry

FORMAT = 1
SUFFIX = ".key"
METADATA = "erasec.key"


@dataclass(frozen=True, eq=False)
class Key:
    """The content of a key file. ``by`` and ``version`` are those of the pass that made it; ``bound`` is the digest of
    the denoiser's weights that it was made for."""

    path: Path
    concept: Concept
    secret: Secret
    by: str
    version: str
    bound: str


def write_key(path: Path, secret: Secret, concept: Concept, by: str, version: str, bound: str) -> None:
    """Write a key file that only its owner can read. The same arguments give the same bytes; see ``Key``."""
    content = {
        "format": FORMAT,
        "by": by,
        "version": version,
        "bound": bound,
        "attentions": list(secret.attentions),
        "concept": concept.model_dump(mode="json"),
    }
    metadata = {METADATA: json.dumps(content, sort_keys=True, ensure_ascii=False)}
    save_sealed(path, {"keys": secret.k_rows, "values": secret.v_rows}, metadata, private=True)


class _Content(TypedDict):
    format: int
    by: str
    version: str
    bound: str
    attentions: Annotated[list[str], Field(min_length=1)]
    concept: Concept


def read_key(path: Path) -> Key:
    """Read a key file. Raises ErasecError where it is missing, damaged or of a later format."""
    if not path.is_file():
        raise ErasecError(
            f"there is no key file {path}", fix="a build with --pass kpop writes key files next to its folders"
        )
    entries, metadata = read_sealed(path, METADATA)
    source = Source(path.name, str(path), "copy it again from where it was made", "is damaged or not a key file")
    content = read_metadata(metadata, METADATA, _Content, FORMAT, source)
    shapes = [entries[name].shape for name in ("keys", "values") if name in entries]
    if len(shapes) < 2 or shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise source.error("its keys and values are not two matrices of one shape")
    concept = content["concept"]
    keys, values = (read_finite(entries, name) for name in ("keys", "values"))
    secret = Secret(concept.name, keys, values, tuple(content["attentions"]))
    return Key(path, concept, secret, content["by"], content["version"], content["bound"])


def is_key(path: Path) -> bool:
    """Whether a file has the suffix of key files, and its header is that of one."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        return METADATA in read_header(path)[1]
    except ErasecError:
        return False


def check_bound(key: Key, digest: str) -> None:
    """Raise ErasecError where ``digest`` is not that of the denoiser that the key was made for."""
    if key.bound != digest:
        raise ErasecError(
            f"the key {key.path.name} belongs to another model",
            why=f"it was made for weights {key.bound[:12]}..., these are {digest[:12]}...",
            fix="give the folder that was built with the key; a key fits no other build",
            where=str(key.path),
        )


def fold_secret(secret: Secret, entries: Mapping[str, Entry]) -> tuple[Memory, ...]:
    """The memories of a secret: constant keys and values at each of its attentions (``processors.fold``).

    ``entries`` are the stored tensors of the edited denoiser. Raises ErasecError where it lacks an attention, or the
    attention reads text states of another width.
    """
    from erasec.attention.processors import fold

    def weight(name: str) -> Tensor:
        vector = name in entries and len(entries[name].shape) == 1  # a bias or a norm
        if name not in entries or (not vector and entries[name].shape[1:] != secret.k_rows.shape[1:]):
            shape = entries[name].shape if name in entries else "missing"
            raise ErasecError(
                f"the key of {secret.concept} does not fit this model",
                why=f"it has rows of {secret.k_rows.shape[1]} for {name}, which is {shape}",
                fix="give the folder that was built with the key",
            )
        return read_tensor(entries[name])

    return fold(weight, secret, entries.__contains__)
