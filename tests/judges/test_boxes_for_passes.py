"""The boxes of a detector reach the passes that need them, by the judge for tuning: safegen and geom_erasing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.recipe.concept import Concept
from erasec.training.boxes import generate_annotated_images
from erasec.training.triplets import generate_triplets

PORTRAIT = Concept(
    name="portrait",
    erase=("a portrait",),
    anchor="a cup",
    keep=("a table",),
    judge=(("nudenet", (("classes", ("FACE_*",)),)), ("clip", ())),
)


def picture(image: Any) -> torch.Tensor:
    """An image as the VAE decodes it: (3, 256, 256) in [-1, 1]."""
    pixels = np.array(Image.fromarray(image).resize((256, 256)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


class Photographs:
    """In place of a denoiser: it samples photographs, a portrait for a prompt about one and coffee for any other."""

    def __init__(self, folder: Path, *judges: str) -> None:
        self.model, self.context = loading.load(str(folder)), Context(judges=judges)
        self.pictures = [picture(skimage.data.astronaut()), picture(skimage.data.coffee())]

    def sample(self, prompts: list[str], *args: Any, **options: Any) -> Any:
        return SimpleNamespace(final=torch.tensor([0 if "portrait" in prompt else 1 for prompt in prompts]))

    def decode(self, latents: torch.Tensor, batch: int = 16) -> torch.Tensor:
        return torch.stack([self.pictures[index] for index in latents.tolist()])


@pytest.fixture
def judges(clip: Path) -> str:
    return f"clip:folder={clip}"


def test_triplets_hide_the_face_that_nudenet_locates(random_folder: Path, judges: str) -> None:
    photographs: Any = Photographs(random_folder, judges)
    triplets = generate_triplets(photographs, PORTRAIT, 2, 1, 1.0, 2)
    changed = (triplets.concept != triplets.censored).any(1)
    assert changed.shape == (2, 256, 256)
    assert changed[:, 50:80, 95:130].double().mean() > 0.9  # the face
    assert not changed[:, 150:].any() and not changed[:, :, 190:].any()  # the rest
    assert torch.equal(triplets.benign, torch.stack([photographs.pictures[1]] * 2))


def test_annotated_images_have_the_box_of_the_face(random_folder: Path, judges: str) -> None:
    photographs: Any = Photographs(random_folder, judges)
    images = generate_annotated_images(photographs, PORTRAIT, 4, 1, 1.0, 0)
    assert [len(boxes) for boxes in images.boxes] == [1, 0, 1, 0]  # every second prompt names the concept
    left, top, right, bottom = images.boxes[0][0]
    assert 0.3 < left < 0.4 and 0.1 < top < 0.2 and 0.5 < right < 0.6 and 0.3 < bottom < 0.4


@pytest.mark.parametrize("make", [generate_triplets, generate_annotated_images])
def test_the_judge_that_decides_does_not_train_the_pass(random_folder: Path, make: Any) -> None:
    """The control: nudenet decides here, so the pass gets no boxes, and the error names another judge."""
    with pytest.raises(ErasecError, match="portrait") as caught:
        make(Photographs(random_folder), PORTRAIT, 2, 1, 1.0, 2)
    assert "nudenet decides the checks" in caught.value.why and "--judge clip" in caught.value.why
