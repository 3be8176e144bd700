"""Approximate keys by weights alone: the last padding tokens of every prompt take the place of the key's rows.

Attention reads a key as further tokens (KPOP, arXiv:2403.12326), which a stock checkpoint cannot hold. But prompts end
in padding tokens, and the states of these hardly depend on the prompt. Ridge least squares changes to_k and to_v so
that the last padding tokens give the keys and values of the key, and all other tokens the ones that they gave before.
This is an approximation: attention read the padding tokens before, and a linear map cannot fully separate their states
from those of other tokens. So the error of the attention outputs is measured, and a check limits it.
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
from erasec.model.threads import LAPACK, fixed_threads
from erasec.training.denoiser import Denoiser

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.checkpoint.safetensors import Entry
    from erasec.model.memory import Memory
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

RIDGE = 1e-3  # relative to the mean diagonal of the Gram matrix
TIMESTEPS = (1 / 6, 1 / 2, 5 / 6)  # as fractions of the noise schedule: where the error is measured
MAX_PROMPTS = 8  # erased prompts, and kept ones, on which the error is measured

Weights = dict[str, Tensor]


def absorb_keys(
    memories: Sequence[Memory],
    concepts: Sequence[Concept],
    model: Model,
    entries: Mapping[str, Entry],
    context: Context,
    limit: float,
) -> tuple[dict[str, Callable[[], Tensor]], Check]:
    """New weights of the denoiser that approximate ``memories``: functions by tensor name that make them, and a check.

    ``entries`` are the stored tensors of the public denoiser, and ``model`` the model that was merged into it. The new
    weights keep the dtypes of the old ones, and are fitted to the concepts' erased and kept prompts and the empty one.
    The check compares their error (see ``residual``) with ``limit``. Raises ErasecError for more rows than fit.
    """
    if joint := [memory.attention for memory in memories if f"{memory.attention}.add_k_proj.weight" in entries]:
        raise ErasecError(
            "a key of joint attention cannot be absorbed",
            why=f"what {joint[0]} reads of padding tokens depends on the picture and on the timestep",
            fix="leave out --absorb: a bundle holds the key",
        )
    denoiser = Denoiser(model, context)
    erase = [prompt.text for concept in concepts for prompt in concept.prompts(concept.phrases)]
    keep = [prompt.text for concept in concepts for prompt in concept.prompts(concept.keep)]
    states = denoiser.token_states(["", *erase, *keep]).double().cpu()
    rows = rows_by_attention(memories)
    before = {name: read_tensor(entries[name]) for name in _tensor_names(rows)}
    solved = solve_weights(states, rows, {name: weight.double() for name, weight in before.items()})
    absorbed = {name: weight.to(before[name].dtype) for name, weight in solved.items()}
    prompts = ["", *_subsample(erase), *_subsample(keep)]
    value = residual(denoiser, prompts, memories, absorbed, context.seed)
    how = (
        "error of the attention outputs relative to the change that the key makes there: 0 is the key itself, 1 is no "
        f"key; {len(rows)} attentions, {len(prompts)} prompts at {len(TIMESTEPS)} timesteps, fitted to {len(states)} "
        "prompts"
    )
    check = Check.at_most("absorbed/residual", value, limit, how)
    return {name: partial(absorbed.__getitem__, name) for name in absorbed}, check


def rows_by_attention(memories: Sequence[Memory]) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values (k, inner) by attention, float64. The rows of several memories follow each other."""
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for memory in memories:
        keys, values = rows.get(memory.attention, (memory.keys[:0], memory.values[:0]))
        rows[memory.attention] = torch.cat([keys, memory.keys]).double(), torch.cat([values, memory.values]).double()
    return rows


@fixed_threads(LAPACK)
def solve_weights(states: Tensor, rows: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, Tensor]) -> Weights:
    """Weights W (inner, d) by tensor name that map the last k tokens of ``states`` (n, t, d) to the k ``rows``.

    They solve min_W sum_j |W c_j - r_j|^2 + sum_i |(W - W') c_i|^2 + lam |W - W'|^2 in float64, where c_j are the last
    tokens, r_j the rows, c_i all other tokens and W' the old ``weights``. All weights share one Gram matrix. Raises
    ErasecError for more rows than half the tokens of a prompt.
    """
    flat = states.flatten(0, 1)
    system = gram(flat)
    system.diagonal().add_(RIDGE * float(system.diagonal().mean()))
    factor = torch.linalg.cholesky(system)
    solved: Weights = {}
    for attention, keys_and_values in rows.items():
        count = len(keys_and_values[0])
        if 2 * count > states.shape[1]:
            raise ErasecError(
                f"{count} rows of keys cannot be absorbed",
                why=f"a prompt has {states.shape[1]} tokens with its padding, and at most half of them can carry rows",
                fix="absorb fewer keys, or build a bundle, which holds any number",
            )
        carriers = states[:, -count:]
        for part, target in zip(("k", "v"), keys_and_values, strict=True):
            name = f"{attention}.to_{part}.weight"
            right_side = target.T @ carriers.sum(0) - weights[name] @ gram(carriers.flatten(0, 1))
            solved[name] = weights[name] + torch.cholesky_solve(right_side.T, factor).T
    return solved


@torch.no_grad()
def residual(
    denoiser: Denoiser, prompts: Sequence[str], memories: Sequence[Memory], weights: Weights, seed: int
) -> float:
    """Frobenius error of the attention outputs with ``weights`` against those with ``memories``, relative to the error
    with neither; infinite where the memories change nothing.

    The inputs are those of calls of the UNet with the memories attached, with noise from ``seed`` for latents.
    """
    unet = denoiser.unet
    names = rows_by_attention(memories)
    before = {name: unet.get_submodule(name).processor for name in names}
    attach(unet, memories, denoiser.steps)
    error, effect = 0.0, 0.0

    def compare(name: str, module: Any, args: Any, kwargs: Any, exact: Tensor) -> None:
        nonlocal error, effect
        attached, module.processor = module.processor, before[name]
        without_key = module.forward(*args, **kwargs)
        original = {part: getattr(module, part).weight.data for part in ("to_k", "to_v")}
        for part, weight in original.items():
            getattr(module, part).weight.data = weights[f"{name}.{part}.weight"].to(weight)
        absorbed = module.forward(*args, **kwargs)
        for part, weight in original.items():
            getattr(module, part).weight.data = weight
        module.processor = attached
        error += float((absorbed - exact).double().square().sum())
        effect += float((without_key - exact).double().square().sum())

    handles = [
        unet.get_submodule(name).register_forward_hook(partial(compare, name), with_kwargs=True) for name in names
    ]
    latents, states = denoiser.draw(range(seed, seed + len(prompts))), denoiser.states(prompts)
    for fraction in TIMESTEPS:
        timesteps = torch.full((len(prompts),), int(fraction * denoiser.steps), device=denoiser.device)
        denoiser.predict(latents, timesteps, states)
    for handle in handles:
        handle.remove()
    return (error / effect) ** 0.5 if effect else float("inf")


def _tensor_names(rows: Mapping[str, object]) -> list[str]:
    """The names of to_k and to_v of each attention."""
    return [f"{name}.to_{part}.weight" for name in rows for part in ("k", "v")]


def _subsample(prompts: list[str]) -> list[str]:
    """At most ``MAX_PROMPTS`` of the prompts, evenly spaced."""
    return prompts[:: max(1, -(-len(prompts) // MAX_PROMPTS))]
