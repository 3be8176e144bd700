"""Memories and secrets: rows that attention reads in addition to the text, and how files store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasec.checkpoint.safetensors import read_named
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.safetensors import Entry

Finite = Annotated[float, Field(allow_inf_nan=False)]


@with_config(ConfigDict(extra="forbid"))
class MemoryRecord(TypedDict):
    """The fields of a ``Memory`` that are not tensors."""

    attention: str
    mode: Literal["joint", "side"]
    weight: Finite
    until: Finite
    guided: bool


@with_config(ConfigDict(extra="allow"))
class ExtrasRecord(TypedDict, total=False):
    """The metadata of extras, as ``pack_extras`` makes it."""

    memories: list[MemoryRecord]
    tokens: list[str]
    negative: str


@dataclass(frozen=True, eq=False)
class Memory:
    """Constant keys and values (k, inner) that one attention of the denoiser reads in addition to the text. A row holds
    all heads.

    ``attention`` is the module, such as "mid_block.attentions.0.transformer_blocks.0.attn2". With ``mode`` "joint" the
    rows are further tokens of the same softmax (KPOP). With "side" they have a softmax of their own, and its result is
    added, multiplied by ``weight`` (EIUP). A side memory acts while t >= (1 - until) T, that is in the noisiest part
    ``until`` of the noise schedule. If ``guided``, it acts only on the prompted half of a batch with guidance.
    """

    attention: str
    keys: Tensor
    values: Tensor
    mode: Literal["joint", "side"] = "joint"
    weight: float = 1.0
    until: float = 1.0
    guided: bool = False


@dataclass(frozen=True, eq=False)
class Secret:
    """What brings a hidden concept back: text states (k, d) for keys and for values, which ``attentions`` read in
    addition to the text (KPOP, arXiv 2403.12326). Edit files leave it out; a build writes it as a key file."""

    concept: str
    k_rows: Tensor
    v_rows: Tensor
    attentions: tuple[str, ...]


def pack_extras(
    memories: Sequence[Memory], tokens: Mapping[str, Tensor], negative: str, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and metadata as plain data, of what an edit carries besides changes of weights.

    Tensors are named PREFIXmemories/NUMBER/ATTENTION.keys, .values, and PREFIXtokens/NAME. The metadata has an entry
    only for what there is.
    """
    tensors = {f"{prefix}tokens/{name}": row for name, row in tokens.items()}
    metadata: dict[str, Any] = {}
    for number, memory in enumerate(memories):
        name = f"{prefix}memories/{number}/{memory.attention}"
        tensors |= {f"{name}.keys": memory.keys, f"{name}.values": memory.values}
        fields = {key: getattr(memory, key) for key in ("attention", "mode", "weight", "until", "guided")}
        metadata.setdefault("memories", []).append(fields)
    metadata |= {"tokens": list(tokens)} if tokens else {}
    metadata |= {"negative": negative} if negative else {}
    return tensors, metadata


def unpack_extras(
    record: ExtrasRecord,
    entries: Mapping[str, Entry],
    prefix: str = "",
    read: Callable[[Mapping[str, Entry], str], Tensor] = read_named,
) -> tuple[tuple[Memory, ...], dict[str, Tensor], str]:
    """The inverse of ``pack_extras``: memories, tokens and negative prompt.

    ``read`` reads a tensor by its name. Raises ErasecError where one is missing or of another kind.
    """
    memories = []
    for number, fields in enumerate(record.get("memories", [])):
        name = f"{prefix}memories/{number}/{fields['attention']}"
        keys, values = read(entries, f"{name}.keys"), read(entries, f"{name}.values")
        if keys.dim() != 2 or values.dim() != 2 or len(keys) != len(values):
            raise _shape_error(name, entries[f"{name}.keys"], "keys and values are not two matrices of as many rows")
        memories.append(Memory(keys=keys, values=values, **fields))
    tokens = {}
    for token in record.get("tokens", []):
        name = f"{prefix}tokens/{token}"
        tokens[token] = read(entries, name)
        if tokens[token].dim() != 1:
            raise _shape_error(name, entries[name], "the row of a token is no vector")
    return tuple(memories), tokens, record.get("negative", "")


def _shape_error(name: str, entry: Entry, why: str) -> ErasecError:
    return ErasecError(f"{entry.file.name} is damaged", why=f"{name}: {why}", where=str(entry.file))
