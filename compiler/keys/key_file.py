"""Key files: what brings one hidden concept back, kept apart from the model that everybody may have.

A key is access control, not encryption: whoever has the weights can search for another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.safetensors import DTYPES, FLOATS, read_header, read_tensor, save
from erasec.errors import ErasecError
from erasec.model.edit import Memory, Secret
from erasec.recipe.concept import Concept

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.safetensors import Entry

FORMAT = 1
SUFFIX = ".key"
METADATA = "erasec.key"


@dataclass(frozen=True, eq=False)
class Key:
    """A key file as it was read. ``bound`` is the digest of the denoiser's weights that it was made with."""

    path: Path
    concept: Concept
    secret: Secret
    by: str
    version: str
    bound: str


def write(path: Path, secret: Secret, concept: Concept, by: str, version: str, bound: str) -> None:
    """Save a key that only its owner can read; same key, same bytes. ``by`` and ``version`` are those of the pass."""
    content = {
        "format": FORMAT, "by": by, "version": version, "bound": bound, "attentions": list(secret.attentions),
        "concept": concept.model_dump(mode="json"),
    }  # fmt: skip
    told = {METADATA: json.dumps(content, sort_keys=True, ensure_ascii=False)}
    save(path, {"keys": secret.keys, "values": secret.values}, told, mode=0o600)


def read(path: Path) -> Key:
    """Read a key file. Raises ErasecError where there is none, it is damaged, or of a later format."""
    if not path.is_file():
        raise ErasecError(f"there is no key file {path}", fix="a build with --pass kpop writes one beside its folders")
    entries, metadata = read_header(path)
    try:
        content = json.loads(metadata[METADATA])
        if content["format"] > FORMAT:
            raise ErasecError(
                f"{path.name} has key format {content['format']}", why=f"this erasec knows formats up to {FORMAT}",
                fix="pip install --upgrade erasec",
            )  # fmt: skip
        concept = Concept.model_validate(content["concept"])
        attentions, by, version, bound = (content[name] for name in ("attentions", "by", "version", "bound"))
        keys, values = entries["keys"], entries["values"]
        if not (attentions and all(isinstance(name, str) for name in (*attentions, by, version, bound))):
            raise ValueError("it names no attention")
        if keys.shape != values.shape or len(keys.shape) != 2 or not {keys.dtype, values.dtype} <= set(FLOATS):
            kinds = " and ".join(f"{DTYPES[each.dtype]} {each.shape}" for each in (keys, values))
            raise ValueError(f"its keys and values are {kinds}, and not two equal lists of rows")
    except (KeyError, TypeError, ValueError) as error:
        what = f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ErasecError(
            f"{path.name} is no whole key file", why=what, where=str(path), fix="fetch it again from where it was made"
        ) from error
    secret = Secret(concept.name, read_tensor(keys), read_tensor(values), tuple(attentions))
    if not bool(secret.keys.isfinite().all() and secret.values.isfinite().all()):
        raise ErasecError(f"{path.name} is no whole key file", why="its numbers are not all finite", where=str(path))
    return Key(path, concept, secret, by, version, bound)


def is_key(path: Path) -> bool:
    """Whether a file is named as a key and its header says that it is one."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        return METADATA in read_header(path)[1]
    except ErasecError:
        return False


def check_bound(key: Key, digest: str) -> None:
    """Raise ErasecError where a denoiser with this digest is not what the key was made with."""
    if key.bound != digest:
        raise ErasecError(
            f"the key {key.path.name} is of another model",
            why=f"it was made with weights {key.bound[:12]}..., these are {digest[:12]}...",
            fix="give the folder that was built with the key; a key opens no other build", where=str(key.path),
        )  # fmt: skip


def folded(secret: Secret, entries: Mapping[str, Entry]) -> tuple[Memory, ...]:
    """A secret as memories, constants in place of rows: K = p_k W_k^T and V = p_v W_v^T at each of its attentions.

    ``entries`` are the tensors of the edited denoiser. Raises ErasecError where an attention is not there or reads
    states of another width.
    """
    from erasec.attention.processors import fold

    def weight(name: str) -> Tensor:
        if name not in entries or entries[name].shape[1:] != secret.keys.shape[1:]:
            found = entries[name].shape if name in entries else "missing"
            raise ErasecError(
                f"the key of {secret.concept} does not fit this model",
                why=f"it has rows of {secret.keys.shape[1]} for {name}, which is {found}",
                fix="give the folder that was built with the key",
            )
        return read_tensor(entries[name])

    return fold(weight, secret)
