"""The judge of a reference world: a classifier that was trained on renders, and finds labels and their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from erasec.base import Judge
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import content_digest, file_digest, read_header, read_tensor
from erasec.model.loading import world_weights
from erasec.worlds.base import Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Images
    from erasec.checkpoint.safetensors import Entry
    from erasec.model.view import Model

THRESHOLD = 0.5
HALF = 6  # half the side of an occluding window, in pixels
COST = 0.2  # a pixel belongs to the box if its mean loss of the logit is at least this share of the largest


@cache
def _vae(world: str) -> dict[str, Entry]:
    """The tensors of the VAE of a world."""
    return Folder(world_weights(world) / world).entries("vae")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a small safetensors file, floating-point ones as float32."""
    tensors = {key: read_tensor(entry) for key, entry in read_header(path)[0].items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


class WorldJudge(Judge):
    """Classifier ``which`` ("a" or "b") of a world. B decides the checks of builds; A is for passes that need a judge.

    ``labels`` are the classifier's outputs. A subclass says which questions are asked (``panel``), and how well a
    picture agrees with its prompt.
    """

    everyday: ClassVar[bool] = False
    labels: ClassVar[tuple[str, ...]]
    sizes: ClassVar[Sizes]

    def __init__(self, which: str = "b", weights: Path | None = None) -> None:
        self.which = which
        self.path = (weights or world_weights(self.name)) / "judges" / f"judge-{which}.safetensors"

    @property
    def title(self) -> str:
        return f"{self.name} judge {self.which.upper()}"

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> Self | None:
        """The judge if the model has the VAE of its world, which no pass edits; None for any other model."""
        if not (world_weights(cls.name) / cls.name / "vae").is_dir():
            return None
        own, other = _vae(cls.name), model.source.entries("vae")
        # Shapes are compared first, because reading the weights of a large VAE takes seconds.
        if {key: entry.shape for key, entry in own.items()} != {key: entry.shape for key, entry in other.items()}:
            return None
        return cls("a" if tuning else "b") if content_digest(own) == content_digest(other) else None

    @cached_property
    def digest(self) -> str:
        return file_digest(self.path)

    @cached_property
    def _classifier(self) -> Any:
        from erasec.worlds import networks

        classifier = networks.classifier(self.which, self.sizes, len(self.labels))
        classifier.load_state_dict(read_state(self.path))
        return classifier.eval()

    def logits(self, images: Images) -> NDArray[np.float64]:
        """Log-odds of every label in every image, (n, labels)."""
        import torch

        with torch.no_grad():
            batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            logits: NDArray[np.float64] = (
                torch.cat([self._classifier(part) for part in batch.split(128)]).double().numpy()
            )
        return logits

    def probabilities(self, images: Images) -> NDArray[np.float64]:
        """Probability of every label in every image, (n, labels)."""
        probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-self.logits(images)))
        return probabilities

    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        columns = [self.labels.index(label) for label in labels]
        seen: NDArray[np.bool_] = self.probabilities(images)[np.arange(len(images)), columns] > THRESHOLD
        return seen

    def boxes(self, images: Images, label: str) -> NDArray[np.int64]:
        """Boxes by occlusion (Zeiler and Fergus, 2014): windows are painted over with the median colour of the image.
        The box surrounds the pixels whose windows lower the logit of the label."""
        column = self.labels.index(label)
        return np.array([self._box(image, column) for image in images], dtype=np.int64).reshape(-1, 4)

    def _box(self, image: NDArray[np.uint8], column: int) -> tuple[int, int, int, int]:
        height, width, _ = image.shape
        background = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
        corners = [(y, x) for y in range(-HALF, height, HALF) for x in range(-HALF, width, HALF)]
        windows = [(slice(max(y, 0), y + 2 * HALF), slice(max(x, 0), x + 2 * HALF)) for y, x in corners]
        hidden = np.repeat(image[None], len(windows), 0)
        for copy, window in zip(hidden, windows, strict=True):
            copy[window] = background
        costs = self.logits(image[None])[0, column] - self.logits(hidden)[:, column]
        heat, count = np.zeros((height, width)), np.zeros((height, width))
        for window, cost in zip(windows, costs, strict=True):
            heat[window] += cost
            count[window] += 1
        heat /= count
        rows, columns = np.nonzero(heat >= COST * heat.max())
        return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
