"""Memories at work in torch: attention processors that read them beside the text, and the pipeline of a bundle.

KPOP (arXiv 2403.12326) adds tokens to the softmax of cross-attention, EIUP (arXiv 2408.01014) adds the output of a
second one. Both are constants once the weights are: attached here, and part of the graph when it is exported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from erasec.checkpoint.folder import variants
from erasec.errors import ErasecError, nearest
from erasec.model import sidecar as extras_
from erasec.model.edit import Memory, Secret
from erasec.progress import hush

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import StableDiffusionPipeline
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from erasec.model.sidecar import Extras

# An attention module and its projected text keys (n, tokens, inner) -> more keys and values (k, inner) like these.
Rows = Callable[[Any, "Tensor"], "tuple[Tensor, Tensor]"]
STOCK = ("AttnProcessor", "AttnProcessor2_0")


class Constant:
    """Folded keys and values (k, inner), moved to where the model is and to its dtype when they are first read."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(self, attention: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys.dtype != like.dtype or self.keys.device != like.device:
            self.keys, self.values = self.keys.to(like), self.values.to(like)
        return self.keys, self.values


class Gate:
    """What side memories must know of the UNet's call that is under way.

    ``step`` is its timestep, scalar or (n,). ``halves`` says whether an even batch is a guided one, whose second half
    is prompted: so in a bare call of the UNet; a pipeline says at each of its calls whether it guides.
    """

    def __init__(self) -> None:
        self.step = torch.tensor(0.0)
        self.halves = True
        self.handle: RemovableHandle | None = None
        self.attentions: set[str] = set()

    def take(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The hook before a call of the UNet. Raises ErasecError where a memory was thrown out since ``attach``."""
        for name in self.attentions:
            if not isinstance(processor := unet.get_submodule(name).processor, MemoryProcessor):
                raise ErasecError(
                    f"the memory at {name} is no longer read", why=f"a {type(processor).__name__} took its place",
                    fix="leave out xformers, attention slicing and fused projections, or detach first",
                )  # fmt: skip
        step = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.step = step if isinstance(step, torch.Tensor) else torch.tensor(step)

    def first(self, batch: int) -> int:
        """The first prompted row of a batch: the second half of an even one, where ``halves``; all rows otherwise.

        In arithmetic, not in branches: the batch is a variable of an exported graph.
        """
        return batch // 2 * (1 - batch % 2) if self.halves else 0


@dataclass(frozen=True, eq=False)
class Side:
    """A side memory of one attention: it acts at timesteps of ``start`` and above."""

    rows: Rows
    weight: float
    start: float
    guided: bool

    def strength(self, gate: Gate, batch: int, like: Tensor) -> Tensor | float:
        """``weight`` for the rows of the batch where it acts and 0 for the others, (n or 1, 1, 1, 1)."""
        strength: Tensor | float = self.weight
        if self.start > 0:
            strength = strength * (gate.step.reshape(-1, 1, 1, 1) >= self.start).to(like)
        if self.guided:
            rows = torch.arange(batch, device=like.device).reshape(-1, 1, 1, 1)
            strength = strength * (rows >= gate.first(batch)).to(like)
        return strength


@dataclass(frozen=True, eq=False)
class MemoryProcessor:
    """What diffusers' AttnProcessor2_0 does in a transformer block, with memories; ``stock`` was there before."""

    stock: Any
    gate: Gate
    joint: tuple[Rows, ...] = ()
    side: tuple[Side, ...] = ()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = context.shape
        key, value = attn.to_k(context), attn.to_v(context)
        memories = [rows(attn, key) for rows in self.joint]
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, length, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
            mask = functional.pad(mask, (0, sum(keys.shape[0] for keys, _ in memories)))

        def heads(states: Tensor) -> Tensor:
            return states.view(batch, -1, attn.heads, key.shape[-1] // attn.heads).transpose(1, 2)

        def together(text: tuple[Tensor, ...], rows: Sequence[Tensor]) -> Tensor:
            return heads(torch.cat([*text, *(each.expand(batch, -1, -1) for each in rows)], 1))

        query = heads(attn.to_q(hidden_states))
        keys, values = together((key,), [k for k, _ in memories]), together((value,), [v for _, v in memories])
        output = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        for side in self.side:
            more_keys, more_values = (together((), [rows]) for rows in side.rows(attn, key))
            beside = functional.scaled_dot_product_attention(query, more_keys, more_values)
            output = output + side.strength(self.gate, batch, query) * beside
        output = output.transpose(1, 2).reshape(batch, -1, key.shape[-1])
        projected: Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


def fold(weights: Callable[[str], Tensor], secret: Secret) -> tuple[Memory, ...]:
    """The secret's rows as constants of each of its attentions: K = p_k W_kᵀ and V = p_v W_vᵀ, (k, inner), float32.

    ``weights`` gives the edited matrices (inner, d) by key, such as "mid_block.[...].attn2.to_k.weight". The products
    are taken in float64. Exact: the softmax over the text and p is the same before and after.
    """
    memories = []
    for name in secret.attentions:
        keys = secret.keys.double() @ weights(f"{name}.to_k.weight").double().T
        values = secret.values.double() @ weights(f"{name}.to_v.weight").double().T
        memories.append(Memory(name, keys.float(), values.float()))
    return tuple(memories)


def attach(unet: nn.Module, memories: Sequence[Memory], steps: int = 1000) -> None:
    """Let the attentions of a UNet2DConditionModel read ``memories``, beside those that were attached before.

    ``steps`` is the length T of the noise schedule. Guided memories act on the prompted rows: in a bare call of the
    UNet the second half of an even batch and all of an odd one. Raises ErasecError, before anything is attached, where
    a memory does not fit.
    """
    for memory in memories:
        _check(memory, _attention(unet, memory.attention))
    if not memories:
        return
    gate = _gate(unet) or Gate()
    if gate.handle is None:
        gate.handle = unet.register_forward_pre_hook(gate.take, with_kwargs=True)
    for memory in memories:
        gate.attentions.add(memory.attention)
        rows = Constant(memory.keys, memory.values)
        # Rounded, as (1 - 0.7) 1000 is a little more than 300 in float64 and would leave step 300 out.
        side = Side(rows, memory.weight, round((1 - memory.until) * steps, 6), memory.guided)
        _add(_attention(unet, memory.attention), gate, rows if memory.mode == "joint" else side)


def detach(unet: nn.Module) -> None:
    """Take all memories off: the UNet computes what it did before, bit by bit."""
    if (gate := _gate(unet)) is not None and gate.handle is not None:
        gate.handle.remove()
    for attention in _attentions(unet).values():
        if isinstance(attention.processor, MemoryProcessor):
            attention.set_processor(attention.processor.stock)


@contextmanager
def attached_rows(unet: nn.Module, keys: Tensor, values: Tensor, attentions: Sequence[str]) -> Iterator[None]:
    """Let ``attentions`` read rows (k, d) of text states as more tokens, inside the block alone, with gradient.

    ``keys`` go through each attention's to_k and ``values`` through its to_v, in the dtype of its text.
    """

    def rows(attention: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        at = attention.to_k.weight
        return attention.to_k(keys.to(at)).to(like), attention.to_v(values.to(at)).to(like)

    before = [(attention, attention.processor) for attention in (_attention(unet, name) for name in attentions)]
    gate = _gate(unet) or Gate()
    try:
        for attention, _ in before:
            _add(attention, gate, rows)
        yield
    finally:
        for attention, processor in before:
            attention.set_processor(processor)


def pipeline(folder: str | Path, **options: Any) -> StableDiffusionPipeline:
    """The StableDiffusionPipeline of a diffusers folder with all that it carries beside its weights.

    ``options`` go to ``StableDiffusionPipeline.from_pretrained``. Memories are attached, new tokens known to tokenizer
    and text encoder, and the folder's negative prompt is taken where a call gives none. ``save_pretrained`` of it saves
    the weights and tokens alone. Raises ErasecError where there is no such folder, or its extras do not fit.
    """
    from diffusers import StableDiffusionPipeline

    root = Path(folder).expanduser()
    if not (root / "model_index.json").is_file():
        raise ErasecError(
            f"{folder} is no diffusers folder", why="it has no model_index.json",
            fix="give a folder on this machine; fetch a model from the hub first: hf download NAME --local-dir DIR",
        )  # fmt: skip
    extras = extras_.read(root)
    kinds = [found for found in map(variants, root.glob("*/")) if found and "" not in found]
    if kinds and "variant" not in options:  # there are no plain weights that could be meant
        options["variant"] = next(iter(kinds[0]))
    hush()
    made = StableDiffusionPipeline.from_pretrained(root, **options)
    if extras.tokens:
        _add_tokens(made, extras.tokens)
    attach(made.unet, extras.memories, made.scheduler.config.num_train_timesteps)
    if extras.negative or any(memory.guided for memory in extras.memories):
        _guide(made, extras)
    return made


def _add_tokens(made: Any, tokens: Mapping[str, Tensor]) -> None:
    """Add tokens to a pipeline's tokenizer, and their rows (d) to its text encoder, exactly."""
    tokenizer, encoder = made.tokenizer, made.text_encoder
    if known := tokens.keys() & tokenizer.get_vocab().keys():
        raise ErasecError(
            f"the token {min(known)!r} is not new", why="the tokenizer has one of this name", fix="name it otherwise"
        )
    width = encoder.get_input_embeddings().weight.shape[1]
    if wrong := [name for name, row in tokens.items() if tuple(row.shape) != (width,)]:
        raise ErasecError(
            f"the row of the token {wrong[0]!r} is {tuple(tokens[wrong[0]].shape)}",
            why=f"this text encoder's rows are ({width},): it was made for another model",
        )
    tokenizer.add_tokens(list(tokens))
    encoder.resize_token_embeddings(
        max(len(tokenizer), encoder.get_input_embeddings().num_embeddings), mean_resizing=False
    )
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        for name, row in tokens.items():
            table[tokenizer.convert_tokens_to_ids(name)] = row.to(table)


def _guide(made: Any, extras: Extras) -> None:
    """Have a pipeline's encode_prompt put the negative prompt in, and tell the memories whether it guides."""
    stock, gate = made.encode_prompt, _gate(made.unet)

    @functools.wraps(stock)
    def encode_prompt(
        prompt: str | list[str] | None, device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        if gate is not None:
            gate.halves = do_classifier_free_guidance
        if extras.negative and negative_prompt is None and negative_prompt_embeds is None:
            count = len(prompt) if isinstance(prompt, list) else len(prompt_embeds) if prompt_embeds is not None else 1
            negative_prompt = extras.negative if isinstance(prompt, str) else [extras.negative] * count
        return stock(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, **more,
        )  # fmt: skip

    made.encode_prompt = encode_prompt


def _attentions(unet: nn.Module) -> dict[str, Any]:
    from diffusers.models.attention_processor import Attention

    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _attention(unet: nn.Module, name: str) -> Any:
    """The attention of that name. Raises ErasecError where there is none that MemoryProcessor can stand for."""
    every = _attentions(unet)
    if name not in every:
        names = [each for each, module in every.items() if module.is_cross_attention]
        raise ErasecError(f"the UNet has no attention {name!r}", why=nearest(name, names or every))
    attention = every[name]
    kind = type(attention.processor).__name__
    if kind not in (*STOCK, MemoryProcessor.__name__):
        raise ErasecError(
            f"no memory can be attached to {name}", why=f"its processor is a {kind}",
            fix="attach before adapters, xformers, attention slicing and fused projections",
        )  # fmt: skip
    more = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "residual_connection", "added_kv_proj_dim")
    if found := [part for part in more if getattr(attention, part, None)]:
        raise ErasecError(
            f"no memory can be attached to {name}", why=f"it has {found[0]}, which a transformer block's has not"
        )
    return attention


def _check(memory: Memory, attention: Any) -> None:
    """Raise ErasecError where a memory does not fit its attention, or says what is never done."""
    inner = attention.to_k.weight.shape[0]
    shapes = tuple(memory.keys.shape), tuple(memory.values.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != inner:
        raise ErasecError(
            f"the memory at {memory.attention} has keys {shapes[0]} and values {shapes[1]}",
            why=f"both must be (k, {inner}) there", fix="it is another model's: make it from this one's weights",
        )  # fmt: skip
    if memory.mode not in ("joint", "side"):
        raise ErasecError(f"the memory at {memory.attention} has the mode {memory.mode!r}", why='"joint" or "side"')
    if not 0 <= memory.until <= 1:
        raise ErasecError(
            f"the memory at {memory.attention} acts until {memory.until:g}", why="it is a share of the steps, 0 to 1"
        )
    if memory.mode == "joint" and (memory.weight, memory.until, memory.guided) != (1, 1, False):
        raise ErasecError(
            f"the joint memory at {memory.attention} has a weight, an end or guided",
            why="tokens of a softmax are there or not", fix='mode="side" for a memory that has them',
        )  # fmt: skip
    if memory.mode == "side" and not len(memory.keys):
        raise ErasecError(f"the side memory at {memory.attention} is empty", why="a softmax over nothing has no value")


def _gate(unet: nn.Module) -> Gate | None:
    processors = (attention.processor for attention in _attentions(unet).values())
    return next((each.gate for each in processors if isinstance(each, MemoryProcessor)), None)


def _add(attention: Any, gate: Gate, more: Rows | Side) -> None:
    old = attention.processor
    if not isinstance(old, MemoryProcessor):
        old = MemoryProcessor(old, gate)
    added = {"side": (*old.side, more)} if isinstance(more, Side) else {"joint": (*old.joint, more)}
    attention.set_processor(replace(old, **added))
