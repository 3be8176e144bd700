"""The inputs of the text keys and values inside a transformer with joint attention (sd3, flux), recorded as it runs.

After ``context_embedder``, text states change from step to step: each block modulates them by the timestep and mixes
them with the image. So the rows for a closed-form edit of ``add_k_proj`` and ``add_v_proj`` are exact only for the
timesteps and latents at which they were recorded. The biases of these layers drop out, as in every closed-form edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from erasec.closed_form.token_rows import Spans, find_spans, select_rows
from erasec.errors import ErasecError, suggestion
from erasec.family import FAMILIES
from erasec.model.networks import load_network
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Prompt

TRAIN_TIMESTEPS = 1000
GUIDANCE = 3.5
SIGMAS = (0.9, 0.7, 0.5)


def capture_inputs(
    model: Model, prompts: Sequence[str], keys: Sequence[str], sigmas: Sequence[float], seed: int = 0, side: int = 16
) -> dict[str, Tensor]:
    """The inputs of the sites ``keys`` for every prompt, by key: (sigmas, n, t, d) in float32.

    ``sigmas`` are noise levels as in diffusers' flow matching schedulers, from 0, an image, to 1, pure noise. The
    latents are pure noise at every level, ``side`` by ``side`` patches (fewer if the model takes fewer), drawn with the
    same ``seed`` for every prompt: only the text differs between prompts. The transformer runs in float32, with the
    model's edits. Raises ErasecError for a family without joint attention, a key that does not read text, and a sigma
    out of range.
    """

    import torch

    if model.family.denoiser_class not in FORWARD:
        joint = [name for name, family in FAMILIES.items() if family.denoiser_class in FORWARD]
        why = f"its family is {model.family.name}; families with joint attention: {', '.join(joint)}"
        raise ErasecError(f"{model.name} has no keys and values of text inside its blocks", why)
    readable = {site.key for site in model.sites if site.attn == "context" and site.proj in ("q", "k", "v")}
    if unknown := [key for key in keys if key not in readable]:
        raise ErasecError(f"{unknown[0]} reads no text states", why=suggestion(unknown[0], readable))
    if outside := [sigma for sigma in sigmas if not 0 <= sigma <= 1]:
        raise ErasecError(f"there is no noise level {outside[0]:g}", why="they are from 0, an image, to 1, pure noise")
    network = load_network(model, model.family.denoiser, model.family.denoiser_class)
    context, pooled = model.encode(prompts).states, model.encode(prompts, "pooled").states[:, 0]
    inputs: dict[str, list[Tensor]] = {key: [] for key in keys}

    def record(key: str, module: Any, arguments: tuple[Tensor, ...]) -> None:
        inputs[key].append(arguments[0][0])

    hooks = [
        network.get_submodule(key.removesuffix(".weight")).register_forward_pre_hook(partial(record, key))
        for key in keys
    ]
    forward = FORWARD[model.family.denoiser_class]
    with torch.no_grad(), bar("capture", len(sigmas) * len(prompts)) as advance:
        for sigma in sigmas:
            for row in range(len(prompts)):
                forward(network, context[row : row + 1], pooled[row : row + 1], sigma, seed, side)
                advance()
    for hook in hooks:
        hook.remove()
    return {key: torch.stack(rows).unflatten(0, (len(sigmas), len(prompts))) for key, rows in inputs.items()}


@dataclass(frozen=True)
class Block:
    """The text K and V of one block, which have the same input, and rows of that input: ``source`` (n, d) becomes
    ``target`` (n, d), ``keep`` (m, d) stays."""

    sites: tuple[Site, ...]
    source: Tensor
    target: Tensor
    keep: Tensor


def block_rows(
    model: Model, prompts: Sequence[Prompt], goals: Sequence[Prompt], kept: Sequence[Prompt], selector: str, seed: int
) -> Iterator[Block]:
    """Rows for a closed-form edit of every block's ``add_k_proj`` and ``add_v_proj``, recorded at ``SIGMAS``.

    ``selector`` chooses the rows of ``prompts`` and of their ``goals``, as in ``token_rows``. Of the ``kept`` prompts
    all rows are taken; with the selector "last" only those of their phrases' last tokens.
    """

    import torch

    sites_by_block: dict[str, list[Site]] = {}
    for site in model.sites:
        if site.attn == "context" and site.proj in ("k", "v"):
            sites_by_block.setdefault(site.block, []).append(site)
    sides = (prompts, goals, kept)
    spans = [find_spans(model, side, "context") for side in sides]
    texts = [prompt.text for side in sides for prompt in side]
    inputs = capture_inputs(model, texts, [sites[0].key for sites in sites_by_block.values()], SIGMAS, seed)
    for sites in sites_by_block.values():
        source, target, keep = [], [], []
        for states in inputs[sites[0].key]:
            erased, goal, stays = map(_with_states, spans, states.split([len(side) for side in sides]))
            source_rows, target_rows = select_rows(erased, goal, selector)
            source.append(source_rows)
            target.append(target_rows)
            keep.append(select_rows(stays, stays, "last" if selector == "last" else "all")[0])
        yield Block(tuple(sites), torch.cat(source), torch.cat(target), torch.cat(keep))


def _with_states(parts: Sequence[Spans], states: Tensor) -> list[Spans]:
    """The same spans with other states (n, t, d), which hold the rows of all parts one part after another."""
    lengths = [part.states.shape[1] for part in parts]
    return [replace(part, states=rows) for part, rows in zip(parts, states.split(lengths, 1), strict=True)]


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    import torch

    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _forward_sd3(network: Any, context: Tensor, pooled: Tensor, sigma: float, seed: int, side: int) -> None:
    import torch

    edge = min(side, network.config.pos_embed_max_size) * network.config.patch_size
    latents = _noise((1, network.config.in_channels, edge, edge), seed)
    network(latents, context, pooled, torch.tensor([sigma * TRAIN_TIMESTEPS]))


def _forward_flux(network: Any, context: Tensor, pooled: Tensor, sigma: float, seed: int, side: int) -> None:
    import torch

    latents = _noise((1, side * side, network.config.in_channels), seed)
    positions = torch.arange(side, dtype=torch.float32)
    grid = torch.cartesian_prod(torch.zeros(1), positions, positions)
    guidance = torch.tensor([GUIDANCE]) if network.config.guidance_embeds else None
    network(latents, context, pooled, torch.tensor([sigma]), grid, torch.zeros(context.shape[1], 3), guidance)


# One forward pass of the denoiser, by its class: they differ in the shape of the latents and in their further inputs.
FORWARD = {"SD3Transformer2DModel": _forward_sd3, "FluxTransformer2DModel": _forward_flux}
