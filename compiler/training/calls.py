"""How the denoisers of diffusers are called: each with the text states that ``Denoiser.states`` gives.

``guidance`` (n,) is the scale that a network with distilled guidance reads, None for all other networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def unet(
    network: Any, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None, guidance: Tensor | None
) -> Tensor:
    """A UNet2DConditionModel. With a ``pooled`` text state (n, d) it also reads the picture's size before it was
    cropped, the corner of the crop, and the size after it (Podell et al., 2023, section 2.2): here there is no crop."""
    import torch

    more: dict[str, Any] = {}
    if pooled is not None:
        scale = 8  # pixels of a latent in every UNet that reads a pooled state
        height, width = (scale * side for side in latents.shape[2:])
        sizes = torch.tensor([[height, width, 0.0, 0.0, height, width]], device=latents.device)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), -1)}
    prediction: Tensor = network(latents, timesteps, encoder_hidden_states=states, return_dict=False, **more)[0]
    return prediction


def sd3(
    network: Any, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None, guidance: Tensor | None
) -> Tensor:
    """An SD3Transformer2DModel; ``timesteps`` are 1000 sigma."""
    inputs = {"encoder_hidden_states": states, "pooled_projections": pooled, "timestep": timesteps}
    velocity: Tensor = network(latents, return_dict=False, **inputs)[0]
    return velocity


def flux(
    network: Any, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None, guidance: Tensor | None
) -> Tensor:
    """A FluxTransformer2DModel; ``timesteps`` are 1000 sigma. It reads patches of 2 x 2 latents with their places, and
    takes sigma itself."""
    import torch

    count, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    patches = latents.view(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    packed = patches.reshape(count, rows * columns, 4 * channels)
    axes = (torch.arange(size, dtype=torch.float32, device=latents.device) for size in (1, rows, columns))
    places = torch.cartesian_prod(*axes)
    text_places = torch.zeros(states.shape[1], 3, device=latents.device)
    velocity: Tensor = network(
        packed, states, pooled, timesteps / 1000, places, text_places, guidance, return_dict=False
    )[0]
    velocity = velocity.view(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return velocity.reshape(latents.shape)


CALLS: dict[str, Callable[[Any, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "UNet2DConditionModel": unet,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
}
