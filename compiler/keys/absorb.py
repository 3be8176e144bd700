"""Keys put into stock weights, as far as they go: the last pads of every prompt are made to carry the key's rows.

An attention reads a key as more tokens (KPOP, arXiv 2403.12326), and stock files have no place for tokens. Yet prompts
end in pads, whose states hardly depend on the prompt. to_k and to_v are changed by ridge least squares so that the last
pads give the key's constants, and all other tokens what they gave before. It is no equivalence: these pads were read,
and linear maps cannot tell them from the others freely. So the error is measured where it matters and held to a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erasec.attention.processors import attach
from erasec.base import Check
from erasec.checkpoint.safetensors import read_tensor
from erasec.closed_form.solver import gram
from erasec.errors import ErasecError
from erasec.training.denoiser import Denoiser

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.checkpoint.safetensors import Entry
    from erasec.model.edit import Memory
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

RIDGE = 1e-3  # of the mean diagonal of the Gram matrix
TIMES = (1 / 6, 1 / 2, 5 / 6)  # of the noise schedule
SHOWN = 8  # prompts of each kind from which queries are taken

Weights = dict[str, Tensor]


def absorbed(
    memories: Sequence[Memory], concepts: Sequence[Concept], model: Model, entries: Mapping[str, Entry],
    context: Context, limit: float,
) -> tuple[dict[str, Callable[[], Tensor]], Check]:  # fmt: skip
    """New tensors of the denoiser by key, in their own dtypes, and how far they are from what ``memories`` do.

    ``entries`` are the public denoiser's, ``model`` is what it was merged from.
    Calibrated on the concepts' phrases to erase and to keep, and the empty prompt.
    """
    denoiser = Denoiser(model, context)
    erase = [prompt.text for concept in concepts for prompt in concept.prompts(concept.phrases)]
    keep = [prompt.text for concept in concepts for prompt in concept.prompts(concept.keep)]
    states = denoiser.states(["", *erase, *keep]).double().cpu()
    rows = joined(memories)
    before = {name: read_tensor(entries[name]) for name in _weights(rows)}
    found = solved(states, rows, {name: weight.double() for name, weight in before.items()})
    stored = {name: weight.to(before[name].dtype) for name, weight in found.items()}
    prompts = ["", *_few(erase), *_few(keep)]
    value = residual(denoiser, prompts, memories, stored, context.seed)
    how = (
        "error of the attentions' outputs relative to what the key changes there: 0 is the key itself, 1 is no key; "
        f"{len(rows)} attentions, {len(prompts)} prompts at {len(TIMES)} timesteps, calibrated on {len(states)} prompts"
    )
    check = Check("absorbed/residual", value, limit, value <= limit, how)
    return {name: partial(stored.__getitem__, name) for name in stored}, check


def joined(memories: Sequence[Memory]) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values (k, inner) by attention, those of several keys one after the other, float64."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for memory in memories:
        keys, values = found.get(memory.attention, (memory.keys[:0], memory.values[:0]))
        found[memory.attention] = torch.cat([keys, memory.keys]).double(), torch.cat([values, memory.values]).double()
    return found


def solved(states: Tensor, rows: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, Tensor]) -> Weights:
    """Weights W (inner, d) by key for which the last tokens of ``states`` (n, t, d) give ``rows``, and all others what
    they gave: min_W sum_j |W c_j - r_j|^2 + sum_i |(W - W') c_i|^2 + lam |W - W'|^2, all in float64.

    One Gram matrix is shared by all. Raises ErasecError where there are more rows than pads could carry.
    """
    flat = states.flatten(0, 1)
    system = gram(flat)
    system.diagonal().add_(RIDGE * float(system.diagonal().mean()))
    factor = torch.linalg.cholesky(system)
    found: Weights = {}
    for attention, parts in rows.items():
        count = len(parts[0])
        if 2 * count > states.shape[1]:
            raise ErasecError(
                f"{count} rows of keys cannot be absorbed", why=f"a prompt has {states.shape[1]} tokens, pads included",
                fix="absorb one key, or build a bundle, which holds any number",
            )  # fmt: skip
        carriers = states[:, -count:]
        for part, wanted in zip(("k", "v"), parts, strict=True):
            name = f"{attention}.to_{part}.weight"
            asked = wanted.T @ carriers.sum(0) - weights[name] @ gram(carriers.flatten(0, 1))
            found[name] = weights[name] + torch.cholesky_solve(asked.T, factor).T
    return found


@torch.no_grad()
def residual(
    denoiser: Denoiser, prompts: Sequence[str], memories: Sequence[Memory], weights: Weights, seed: int
) -> float:
    """Frobenius error of what the attentions put out with ``weights`` against ``memories``, over that without either.

    Queries are those of real calls: every attention is asked what it is asked when the memories are attached.
    """
    unet = denoiser.unet
    names = joined(memories)
    before = {name: unet.get_submodule(name).processor for name in names}
    attach(unet, memories, denoiser.steps)
    wrong, effect = 0.0, 0.0

    def compare(name: str, module: Any, args: Any, kwargs: Any, exact: Tensor) -> None:
        nonlocal wrong, effect
        now, module.processor = module.processor, before[name]
        none = module.forward(*args, **kwargs)
        own = {part: getattr(module, part).weight.data for part in ("to_k", "to_v")}
        for part, weight in own.items():
            getattr(module, part).weight.data = weights[f"{name}.{part}.weight"].to(weight)
        near = module.forward(*args, **kwargs)
        for part, weight in own.items():
            getattr(module, part).weight.data = weight
        module.processor = now
        wrong += float((near - exact).double().square().sum())
        effect += float((none - exact).double().square().sum())

    handles = [
        unet.get_submodule(name).register_forward_hook(partial(compare, name), with_kwargs=True) for name in names
    ]
    latents, states = denoiser.draw(range(seed, seed + len(prompts))), denoiser.states(prompts)
    for share in TIMES:
        times = torch.full((len(prompts),), int(share * denoiser.steps), device=denoiser.device)
        denoiser.predict(latents, times, states)
    for handle in handles:
        handle.remove()
    return (wrong / effect) ** 0.5 if effect else float("inf")


def _weights(rows: Mapping[str, object]) -> list[str]:
    return [f"{name}.to_{part}.weight" for name in rows for part in ("k", "v")]


def _few(prompts: list[str]) -> list[str]:
    """At most ``SHOWN``, evenly taken."""
    return prompts[:: max(1, -(-len(prompts) // SHOWN))]
