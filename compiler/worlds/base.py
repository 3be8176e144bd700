"""The description of a reference world, from which the trainer and the judges work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erasec.errors import ErasecError

# Each world with the function that describes it, given the folder of its data.
WORLDS = {"glyphs": "erasec.glyphs.recipe:world", "emoji": "erasec.emoji.recipe:world"}


@dataclass(frozen=True)
class Picture:
    """A training picture: uint8 (64, 64, 3), its caption, its labels (n,) of 0 and 1, and the group it belongs to.

    Pictures of one group are hard to tell apart. A world without groups gives all pictures the group 0.
    """

    image: NDArray[np.uint8]
    caption: str
    labels: NDArray[np.float32]
    group: int = 0


@dataclass(frozen=True)
class Sizes:
    """The sizes of a world's networks, in the classes of Stable Diffusion 1."""

    vocabulary: int
    text_width: int
    vae_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    judge_a: tuple[int, ...]
    judge_b: tuple[int, ...]
    judge_hidden: int
    # Channels of the image half of the contrastive pair, or () for the vision tower of transformers' CLIPModel.
    pair: tuple[int, ...]

    @property
    def latent_side(self) -> int:
        """Height and width of a latent: a VAE halves a picture between its levels."""
        return 64 >> (len(self.vae_channels) - 1)


@dataclass(frozen=True)
class World:
    """A world: what its pictures are, what its judges see, how large its networks are and how long they train."""

    name: str
    labels: tuple[str, ...]
    picture: Callable[[int, int], Picture]
    sizes: Sizes
    twin: str  # the name of the model that has never seen a picture or caption of ``left_out``
    left_out: tuple[str, ...]
    images: int
    judge_images: int
    steps: dict[str, int]
    text_rate: float = 1e-3
    hard_negatives: bool = False
    spread: float = 0.0  # weight of the terms that spread text states over all dimensions
    garbage: float = 0.0  # share of a judge's batch that shows nothing: shuffled patches
    redrawn: float = 0.0  # share of a judge's soft copies that the base UNet draws again; the others are the VAE's
    # Writes a caption anew for each step of the text stage: more variants than the pictures have captions.
    reword: Callable[[np.random.Generator, str], str] | None = None
    unet_batches: tuple[int, int] = (64, 128)  # up to 65 % of the steps, and afterwards


def open_world(name: str, data: Path | None) -> World:
    """The world ``name``. ``data`` is the folder of its arrays, which glyphs does not need."""
    if name not in WORLDS:
        raise ErasecError(f"there is no world {name!r}", fix=f"choose from {', '.join(WORLDS)}")
    module, function = WORLDS[name].split(":")
    world: World = getattr(importlib.import_module(module), function)(data)
    return world
