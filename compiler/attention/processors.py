"""Attention processors that read memories in addition to the text.

KPOP (arXiv:2403.12326) adds tokens to the softmax of cross-attention; EIUP (arXiv:2408.01014) adds the output of a
second softmax. In both, the memory's keys and values are constants for given weights, and part of an exported graph.

In a transformer with joint attention the keys and values of the text come from ``add_k_proj`` and ``add_v_proj``, and
picture and text both read them. A memory's rows are inputs of these two, without the modulation by the timestep that
the text's states have there, so that its keys and values are constants there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from erasec.errors import ErasecError, suggestion
from erasec.model.memory import Memory, Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


# (attention module, its keys of the text (n, tokens, inner)) -> keys and values (k, inner) of that dtype and device.
RowSource = Callable[[Any, "Tensor"], "tuple[Tensor, Tensor]"]
# The processors of diffusers that MemoryProcessor can replace.
STOCK = ("AttnProcessor", "AttnProcessor2_0")
NORM_EPS = 1e-6  # of the norm of keys in the joint attention of Stable Diffusion 3.5
STOCK_JOINT = "JointAttnProcessor2_0"  # which JointMemoryProcessor can replace


class ConstantRows:
    """Constant keys and values (k, inner). They take the model's device and dtype when they are first read."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(self, attention: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys.dtype != like.dtype or self.keys.device != like.device:
            self.keys, self.values = self.keys.to(like), self.values.to(like)
        return self.keys, self.values


class CallState:
    """What side memories need to know about the current call of the UNet.

    ``timestep`` is that of the call, scalar or (n,). ``guided`` says that the second half of an even batch is prompted
    and the first is not, as in classifier-free guidance. That is the default; a pipeline sets it in each of its calls.
    """

    def __init__(self) -> None:
        self.timestep = torch.tensor(0.0)
        self.guided = True
        self.handle: RemovableHandle | None = None
        self.attentions: set[str] = set()

    def before_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The hook before a call of the UNet. Raises ErasecError where a processor was replaced since ``attach``."""
        for name in self.attentions:
            if not isinstance(processor := unet.get_submodule(name).processor, MemoryProcessor):
                raise ErasecError(
                    f"the memory at {name} is no longer read",
                    why=f"a {type(processor).__name__} took its place",
                    fix="do without xformers, attention slicing and fused projections, or detach the memories first",
                )
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.timestep = timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)

    def first_prompted(self, batch: int) -> int:
        """The index of the first prompted row: half of an even batch where ``guided``, else 0.

        It is arithmetic without branches, as the batch size is a variable of an exported graph.
        """
        return batch // 2 * (1 - batch % 2) if self.guided else 0


@dataclass(frozen=True, eq=False)
class SideMemory:
    """A side memory of one attention. It acts at timesteps of ``start`` and above; where it is ``guided``, only on
    prompted rows."""

    rows: RowSource
    weight: float
    start: float
    guided: bool

    def strength(self, state: CallState, batch: int, like: Tensor) -> Tensor | float:
        """``weight`` for the rows of the batch on which it acts and 0 for the others, (n or 1, 1, 1, 1)."""
        strength: Tensor | float = self.weight
        if self.start > 0:
            strength = strength * (state.timestep.reshape(-1, 1, 1, 1) >= self.start).to(like)
        if self.guided:
            rows = torch.arange(batch, device=like.device).reshape(-1, 1, 1, 1)
            strength = strength * (rows >= state.first_prompted(batch)).to(like)
        return strength


@dataclass(frozen=True, eq=False)
class MemoryProcessor:
    """Attention in a transformer block as diffusers' AttnProcessor2_0 computes it, with memories.

    ``stock`` is the processor that it replaces. ``joint`` memories are further tokens of the softmax; each of the
    ``side`` memories adds the output of a softmax of its own.
    """

    stock: Any
    state: CallState
    joint: tuple[RowSource, ...] = ()
    side: tuple[SideMemory, ...] = ()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = context.shape
        key, value = attn.to_k(context), attn.to_v(context)
        memories = [rows(attn, key) for rows in self.joint]
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, length, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
            mask = functional.pad(mask, (0, sum(keys.shape[0] for keys, _ in memories)))

        def split_heads(states: Tensor) -> Tensor:
            return states.view(batch, -1, attn.heads, key.shape[-1] // attn.heads).transpose(1, 2)

        def with_rows(text: tuple[Tensor, ...], rows: Sequence[Tensor]) -> Tensor:
            return split_heads(torch.cat([*text, *(part.expand(batch, -1, -1) for part in rows)], 1))

        query = split_heads(attn.to_q(hidden_states))
        keys, values = with_rows((key,), [k for k, _ in memories]), with_rows((value,), [v for _, v in memories])
        output = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        for side in self.side:
            side_keys, side_values = (with_rows((), [rows]) for rows in side.rows(attn, key))
            side_output = functional.scaled_dot_product_attention(query, side_keys, side_values)
            output = output + side.strength(self.state, batch, query) * side_output
        output = output.transpose(1, 2).reshape(batch, -1, key.shape[-1])
        projected: Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


@dataclass(frozen=True, eq=False)
class JointMemoryProcessor(MemoryProcessor):
    """Joint attention as diffusers' JointAttnProcessor2_0 computes it, with ``joint`` memories. It has no ``side``
    memories: there is no output of the text alone to which theirs could be added."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        assert encoder_hidden_states is not None  # attentions without text have no memories
        batch, length, _ = hidden_states.shape

        def split_heads(states: Tensor) -> Tensor:
            return states.view(len(states), -1, attn.heads, states.shape[-1] // attn.heads).transpose(1, 2)

        def normed(states: Tensor, norm: Any) -> Tensor:
            return split_heads(states) if norm is None else norm(split_heads(states))

        query = normed(attn.to_q(hidden_states), attn.norm_q)
        text_query = normed(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)
        key = attn.to_k(hidden_states)
        memories = [rows(attn, key) for rows in self.joint]
        keys = [normed(key, attn.norm_k), normed(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)]
        keys += [split_heads(rows[None]).expand(batch, -1, -1, -1) for rows, _ in memories]
        values = [split_heads(attn.to_v(hidden_states)), split_heads(attn.add_v_proj(encoder_hidden_states))]
        values += [split_heads(rows[None]).expand(batch, -1, -1, -1) for _, rows in memories]
        queries = torch.cat([query, text_query], 2)
        output = functional.scaled_dot_product_attention(queries, torch.cat(keys, 2), torch.cat(values, 2))
        output = output.transpose(1, 2).reshape(batch, -1, key.shape[-1]).to(query.dtype)
        picture, text = output[:, :length], output[:, length:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](picture)), text


def project_rows(attention: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (k, inner) of rows (k, d) in one attention, of the text's tokens or of a memory."""
    if attention.added_kv_proj_dim is None:
        weight = attention.to_k.weight
        return attention.to_k(keys.to(weight)), attention.to_v(values.to(weight))
    weight = attention.add_k_proj.weight
    projected = attention.add_k_proj(keys.to(weight))
    if attention.norm_added_k is not None:
        projected = attention.norm_added_k(projected.unflatten(1, (attention.heads, -1))).flatten(1)
    return projected, attention.add_v_proj(values.to(weight))


def fold_rows(
    attention: str, keys: Tensor, values: Tensor, weights: Callable[[str], Tensor], present: Callable[[str], bool]
) -> tuple[Tensor, Tensor]:
    """What ``project_rows`` computes, in float64 from the weights of an attention by their names."""

    def project(rows: Tensor, name: str) -> Tensor:
        bias = f"{attention}.{name}.bias"
        product = rows.double() @ weights(f"{attention}.{name}.weight").double().T
        return product + weights(bias).double() if present(bias) else product

    if not present(f"{attention}.add_k_proj.weight"):
        return project(keys, "to_k"), project(values, "to_v")
    projected, norm = project(keys, "add_k_proj"), f"{attention}.norm_added_k.weight"
    if present(norm):
        scale = weights(norm).double()
        heads = projected.unflatten(1, (-1, len(scale)))
        projected = (heads * (heads.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * scale).flatten(1)
    return projected, project(values, "add_v_proj")


def fold(weights: Callable[[str], Tensor], secret: Secret, present: Callable[[str], bool]) -> tuple[Memory, ...]:
    """The rows of a secret as constant keys and values of each of its attentions: K = p_k W_kᵀ and V = p_v W_vᵀ; in
    joint attention with the biases and the norm of the text's keys.

    ``weights`` returns the edited tensor of a name, such as the matrix (inner, d) of
    "mid_block.[...].attn2.to_k.weight"; ``present`` says whether there is one. The products are computed in float64 and
    returned in float32, (k, inner). Folding is exact up to rounding: attention computes the same from the rows and from
    the constants.
    """
    memories = []
    for name in secret.attentions:
        keys, values = fold_rows(name, secret.k_rows, secret.v_rows, weights, present)
        memories.append(Memory(name, keys.float(), values.float()))
    return tuple(memories)


def attach(unet: nn.Module, memories: Sequence[Memory], steps: int = 1000) -> None:
    """Let the attentions of a denoiser read ``memories``, in addition to those attached before.

    ``steps`` is the length T of the noise schedule. Guided memories act on the prompted rows: the second half of an
    even batch and all of an odd one, unless a pipeline says otherwise (see ``CallState``). Raises ErasecError where a
    memory does not fit; then none is attached.
    """
    for memory in memories:
        _check(memory, _attention(unet, memory.attention))
    if not memories:
        return
    state = call_state(unet) or CallState()
    if state.handle is None:
        state.handle = unet.register_forward_pre_hook(state.before_call, with_kwargs=True)
    for memory in memories:
        state.attentions.add(memory.attention)
        rows = ConstantRows(memory.keys, memory.values)
        # Rounded: (1 - 0.7) 1000 is a little more than 300 in float64, and the memory would not act at timestep 300.
        side = SideMemory(rows, memory.weight, round((1 - memory.until) * steps, 6), memory.guided)
        _add(_attention(unet, memory.attention), state, rows if memory.mode == "joint" else side)


def detach(unet: nn.Module) -> None:
    """Remove all memories. The UNet then computes the same bits as before ``attach``."""
    if (state := call_state(unet)) is not None and state.handle is not None:
        state.handle.remove()
    for attention in _attentions(unet).values():
        if isinstance(attention.processor, MemoryProcessor):
            attention.set_processor(attention.processor.stock)


@contextmanager
def attached_rows(unet: nn.Module, keys: Tensor, values: Tensor, attentions: Sequence[str]) -> Iterator[None]:
    """Inside the block, let ``attentions`` read rows (k, d) of text states as further tokens; gradients reach the rows.

    Each attention projects ``keys`` and ``values`` as those of the text, in the dtype of its weights.
    """

    def rows(attention: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        projected = project_rows(attention, keys, values)
        return projected[0].to(like), projected[1].to(like)

    before = [(attention, attention.processor) for attention in (_attention(unet, name) for name in attentions)]
    state = call_state(unet) or CallState()
    try:
        for attention, _ in before:
            _add(attention, state, rows)
        yield
    finally:
        for attention, processor in before:
            attention.set_processor(processor)


def _attentions(unet: nn.Module) -> dict[str, Any]:
    """All attention modules of a UNet, by name."""
    from diffusers.models.attention_processor import Attention

    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _attention(unet: nn.Module, name: str) -> Any:
    """The attention of that name. Raises ErasecError where there is none, or MemoryProcessor cannot replace its own."""
    attentions = _attentions(unet)
    if name not in attentions:
        cross = [other for other, module in attentions.items() if module.is_cross_attention]
        raise ErasecError(f"the denoiser has no attention {name!r}", why=suggestion(name, cross or attentions))
    attention = attentions[name]
    kind = type(attention.processor).__name__
    joint = kind == STOCK_JOINT or (isinstance(attention.processor, MemoryProcessor) and _is_joint(attention))
    if joint:
        return attention
    if kind not in (*STOCK, MemoryProcessor.__name__):
        raise ErasecError(
            f"no memory can be attached to {name}",
            why=f"its processor is a {kind}",
            fix="attach memories before adapters, xformers, attention slicing and fused projections",
        )
    unsupported = (
        "spatial_norm",
        "group_norm",
        "norm_cross",
        "norm_q",
        "norm_k",
        "residual_connection",
        "added_kv_proj_dim",
    )
    if present := [part for part in unsupported if getattr(attention, part, None)]:
        raise ErasecError(
            f"no memory can be attached to {name}",
            why=f"it has {present[0]}, which attention in a transformer block does not have",
        )
    return attention


def _is_joint(attention: Any) -> bool:
    """Whether an attention reads text by further matrices than those of the picture."""
    return attention.added_kv_proj_dim is not None


def _check(memory: Memory, attention: Any) -> None:
    """Raise ErasecError where a memory does not fit its attention, or its fields contradict each other."""
    inner = attention.to_k.weight.shape[0]
    shapes = tuple(memory.keys.shape), tuple(memory.values.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != inner:
        raise ErasecError(
            f"the memory at {memory.attention} has keys {shapes[0]} and values {shapes[1]}",
            why=f"both must be (k, {inner}) there",
            fix="it was made for another model; make one from the weights of this model",
        )
    if memory.mode not in ("joint", "side"):
        raise ErasecError(
            f"the memory at {memory.attention} has the mode {memory.mode!r}", why='a mode is "joint" or "side"'
        )
    if memory.mode == "side" and _is_joint(attention):
        raise ErasecError(
            f"the memory at {memory.attention} has the mode 'side'",
            why="joint attention has no output of the text alone to which the memory's could be added",
        )
    if not 0 <= memory.until <= 1:
        raise ErasecError(
            f"the memory at {memory.attention} acts until {memory.until:g}",
            why="until is a fraction of the noise schedule, 0 to 1",
        )
    if memory.mode == "joint" and (memory.weight, memory.until, memory.guided) != (1, 1, False):
        raise ErasecError(
            f"the joint memory at {memory.attention} has a weight, an end or guided",
            why="these apply to the output of a side memory, and a joint memory has no output of its own",
            fix='give the memory mode="side"',
        )
    if memory.mode == "side" and not len(memory.keys):
        raise ErasecError(f"the side memory at {memory.attention} is empty", why="a softmax over nothing has no value")


def call_state(unet: nn.Module) -> CallState | None:
    """The state that the attached memories of a UNet share; None where there are no memories."""
    processors = (attention.processor for attention in _attentions(unet).values())
    return next((processor.state for processor in processors if isinstance(processor, MemoryProcessor)), None)


def _add(attention: Any, state: CallState, memory: RowSource | SideMemory) -> None:
    """Give an attention a processor that reads one more memory."""
    processor = attention.processor
    if not isinstance(processor, MemoryProcessor):
        kind = JointMemoryProcessor if _is_joint(attention) else MemoryProcessor
        processor = kind(processor, state)
    if isinstance(memory, SideMemory):
        attention.set_processor(replace(processor, side=(*processor.side, memory)))
    else:
        attention.set_processor(replace(processor, joint=(*processor.joint, memory)))
