"""Memories and secrets: rows that attention reads in addition to the text, and how files store them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from erasec.checkpoint.safetensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


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
    metadata: Mapping[str, Any], entries: Mapping[str, Any], prefix: str = ""
) -> tuple[tuple[Memory, ...], dict[str, Tensor], str]:
    """The inverse of ``pack_extras``: memories, tokens and negative prompt. Raises KeyError or TypeError where the
    metadata does not match the tensors."""
    memories = []
    for number, fields in enumerate(metadata.get("memories", [])):
        name = f"{prefix}memories/{number}/{fields['attention']}"
        memories.append(
            Memory(keys=read_tensor(entries[f"{name}.keys"]), values=read_tensor(entries[f"{name}.values"]), **fields)
        )
    tokens = {name: read_tensor(entries[f"{prefix}tokens/{name}"]) for name in metadata.get("tokens", [])}
    return tuple(memories), tokens, metadata.get("negative", "")
