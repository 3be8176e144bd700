"""Image files as tensors in [-1, 1], and such tensors as pixels for a judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from erasec.errors import ErasecError

if TYPE_CHECKING:
    from pathlib import Path

    from erasec.base import Images


def read_image(path: Path, listed_in: str = "") -> Image.Image:
    """An image file in RGB. ``listed_in`` is the file that lists the image, for the error.

    Raises ErasecError where there is no such file, or PIL cannot read it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        why = f"{listed_in} lists it" if listed_in else ""
        raise ErasecError(f"there is no image {path.name}", why=why, where=str(path)) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ErasecError(f"{path.name} is not an image that can be read", why=str(error), where=str(path)) from error


def to_square_tensor(image: Image.Image, size: int) -> Tensor:
    """The centre square of an RGB image, scaled to (3, size, size), float32 in [-1, 1]."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Images:
    """Images (n, 3, h, w) in [-1, 1] as bytes (n, h, w, 3), as a judge looks at them."""
    pixels: Images = ((images.cpu() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
