"""LPIPS, the perceptual distance of two pictures of the same prompt and seed, by the package ``lpips``.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018). The package is optional.
Its trunk, AlexNet, is downloaded by torchvision; a build never does that, because it would wait for a server that may
not be there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from erasec.base import Images

INSTALL = 'pip install "erasec[lpips]"'
FETCH = "python -c \"import lpips; lpips.LPIPS(net='alex')\""
BATCH = 16  # pairs that are compared at once


def unavailable() -> str:
    """Why LPIPS cannot be measured here, with the command that mends it; "" if it can. Downloads nothing."""
    if importlib.util.find_spec("lpips") is None:
        return f"the package lpips is not installed: {INSTALL}"
    import torch

    if not list((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth")):
        return f"the weights of AlexNet are not in the cache of torch.hub: {FETCH}"
    return ""


def distances(before: Images, after: Images, device: str = "cpu") -> NDArray[np.float64]:
    """LPIPS (AlexNet, version 0.1) of each pair of pictures (n, height, width, 3), (n,).

    Pictures keep their size. Papers on erasure reduce them to 64 pixels first, which changes the values.
    """
    import torch

    network = _network(device)
    parts = [np.zeros(0)]
    with torch.no_grad():
        for start in range(0, len(before), BATCH):
            pair = [_tensor(images[start : start + BATCH], device) for images in (before, after)]
            parts.append(network(*pair).reshape(-1).double().cpu().numpy())
    return np.concatenate(parts)


def _tensor(images: Images, device: str) -> Any:
    """Pictures as the package reads them: (n, 3, height, width) in [-1, 1]."""
    import torch

    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _network(device: str) -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).to(device).eval()
