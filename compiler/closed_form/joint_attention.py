"""What the keys and values of text read inside a transformer with joint attention (sd3, flux), taken as it runs.

After ``context_embedder`` text is no longer the same at every step: each block norms it by the timestep and mixes it
with the image. So rows for a closed-form edit of ``add_k_proj`` and ``add_v_proj`` hold for the timesteps and latents
at which they were taken, and no others; the matrices have them as inputs, and their biases drop out as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erasec.checkpoint.safetensors import read_tensor
from erasec.closed_form.base import Spans, chosen, spans
from erasec.errors import ErasecError, nearest
from erasec.progress import bar, hush

if TYPE_CHECKING:
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Prompt

CLASSES = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
STEPS = 1000
GUIDANCE = 3.5
TIMES = (0.9, 0.7, 0.5)


def captured(
    model: Model, prompts: Sequence[str], keys: Sequence[str], times: Sequence[float], seed: int = 0, side: int = 16
) -> dict[str, Tensor]:
    """The inputs of the sites ``keys`` for every prompt, (times, n, t, d) in float32 by key.

    ``times`` are between 0, an image, and 1, noise. The latents are noise at all of them, ``side`` by ``side`` patches
    (fewer where the model has fewer) of the same ``seed`` for every prompt, so that prompts differ by their text alone.
    The whole transformer is held in float32, with the model's edits. Raises ErasecError for another family, and for a
    key that is no site of text.
    """
    if model.family.name not in CLASSES:
        why = f"its family is {model.family.name}; those with joint attention: {', '.join(CLASSES)}"
        raise ErasecError(f"{model.name} has no keys and values of text inside", why)
    known = {site.key for site in model.sites if site.attn == "context" and site.proj in ("q", "k", "v")}
    if strange := [key for key in keys if key not in known]:
        raise ErasecError(f"{strange[0]} reads no text states", why=nearest(strange[0], known))
    if wrong := [time for time in times if not 0 <= time <= 1]:
        raise ErasecError(f"there is no time {wrong[0]:g}", why="times are between 0, an image, and 1, noise")
    network = transformer(model)
    context, pooled = model.encode(prompts).states, model.encode(prompts, "pooled").states[:, 0]
    found: dict[str, list[Tensor]] = {key: [] for key in keys}

    def take(key: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        found[key].append(inputs[0][0])

    hooks = [
        network.get_submodule(key.removesuffix(".weight")).register_forward_pre_hook(partial(take, key)) for key in keys
    ]
    run = _flux if model.family.name == "flux" else _sd3
    with torch.no_grad(), bar("capture", len(times) * len(prompts)) as advance:
        for time in times:
            for row in range(len(prompts)):
                run(network, context[row : row + 1], pooled[row : row + 1], time, seed, side)
                advance()
    for hook in hooks:
        hook.remove()
    return {key: torch.stack(rows).unflatten(0, (len(times), len(prompts))) for key, rows in found.items()}


@dataclass(frozen=True)
class Block:
    """K and V of one block, which read the same, and rows of what they read: to erase, what they become, to keep."""

    sites: tuple[Site, ...]
    source: Tensor
    target: Tensor
    keep: Tensor


def blocks(
    model: Model, prompts: Sequence[Prompt], goals: Sequence[Prompt], kept: Sequence[Prompt], selector: str, seed: int
) -> Iterator[Block]:
    """Rows for a closed-form edit of every block's ``add_k_proj`` and ``add_v_proj``, taken at ``TIMES``.

    Of the kept prompts all rows, or with the selector "last" those of their phrases' last tokens.
    """
    pairs: dict[str, list[Site]] = {}
    for site in model.sites:
        if site.attn == "context" and site.proj in ("k", "v"):
            pairs.setdefault(site.block, []).append(site)
    sides = (prompts, goals, kept)
    places = [spans(model, side, "context") for side in sides]
    texts = [prompt.text for side in sides for prompt in side]
    states = captured(model, texts, [sites[0].key for sites in pairs.values()], TIMES, seed)
    for sites in pairs.values():
        source, target, keep = [], [], []
        for one in states[sites[0].key]:
            erased, goal, held = map(_at, places, one.split([len(side) for side in sides]))
            rows, becomes = chosen(erased, goal, selector)
            source.append(rows)
            target.append(becomes)
            keep.append(chosen(held, held, "last" if selector == "last" else "all")[0])
        yield Block(tuple(sites), torch.cat(source), torch.cat(target), torch.cat(keep))


def _at(parts: Sequence[Spans], states: Tensor) -> list[Spans]:
    """The same places in other states (n, t, d), which hold the rows of all parts one part after another."""
    lengths = [part.states.shape[1] for part in parts]
    return [replace(part, states=rows) for part, rows in zip(parts, states.split(lengths, 1), strict=True)]


def transformer(model: Model) -> Any:
    """The denoiser of a model with joint attention as diffusers builds it, in float32, with the model's edits."""
    import diffusers

    hush()
    component = model.family.denoiser
    kind = getattr(diffusers, CLASSES[model.family.name])
    with torch.device("meta"):
        network = kind.from_config(model.source.config(component))
    makers: dict[str, Callable[[], Tensor]] = {
        key: partial(read_tensor, entry) for key, entry in model.source.entries(component).items()
    }
    makers |= model.merged().get(component, {})
    network.load_state_dict({key: make().float() for key, make in makers.items()}, assign=True)
    return network.eval()


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _sd3(network: Any, context: Tensor, pooled: Tensor, time: float, seed: int, side: int) -> None:
    edge = min(side, network.config.pos_embed_max_size) * network.config.patch_size
    latents = _noise((1, network.config.in_channels, edge, edge), seed)
    network(latents, context, pooled, torch.tensor([time * STEPS]))


def _flux(network: Any, context: Tensor, pooled: Tensor, time: float, seed: int, side: int) -> None:
    latents = _noise((1, side * side, network.config.in_channels), seed)
    places = torch.arange(side, dtype=torch.float32)
    grid = torch.cartesian_prod(torch.zeros(1), places, places)
    guidance = torch.tensor([GUIDANCE]) if network.config.guidance_embeds else None
    network(latents, context, pooled, torch.tensor([time]), grid, torch.zeros(context.shape[1], 3), guidance)
