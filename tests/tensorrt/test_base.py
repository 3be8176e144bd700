"""What both kinds of engines have in common: the shapes that they are built for."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import TEXT_TO_IMAGE

from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.targets.trt_rtx import TrtRtx
from erasec.tensorrt.base import parse_range


def test_profiles_follow_the_model(random_folder: Path) -> None:
    profiles = TrtRtx(vae_encoder=True, batch="1:2:3", height="64:64:128", width="96").profiles(Folder(random_folder))
    assert profiles == {
        "text_encoder": {"input_ids": [(1, 77), (4, 77), (6, 77)]},
        "unet": {
            "sample": [(1, 4, 8, 12), (4, 4, 8, 12), (6, 4, 16, 12)],
            "encoder_hidden_states": [(1, 77, 128), (4, 77, 128), (6, 77, 128)],
        },
        "vae_decoder": {"latent_sample": [(1, 4, 8, 12), (2, 4, 8, 12), (3, 4, 16, 12)]},
        "vae_encoder": {"sample": [(1, 3, 64, 96), (2, 3, 64, 96), (3, 3, 128, 96)]},
    }
    assert set(TrtRtx().profiles(Folder(random_folder))) == set(TEXT_TO_IMAGE)


def test_several_images_may_have_one_prompt(random_folder: Path) -> None:
    profiles = TrtRtx(batch="4").profiles(Folder(random_folder))
    assert [shape[0] for shape in profiles["text_encoder"]["input_ids"]] == [1, 8, 8]
    assert [shape[0] for shape in profiles["unet"]["sample"]] == [4, 8, 8]


def test_sizes_that_the_unet_cannot_downscale_are_refused(random_folder: Path) -> None:
    with pytest.raises(ErasecError, match="option width has 72") as caught:
        TrtRtx(width="64:72:96").profiles(Folder(random_folder))
    assert caught.value.why == "images of this model have a multiple of 32 pixels"


def test_a_range_is_three_rising_numbers_or_one() -> None:
    assert parse_range("x", "1: 2:4") == (1, 2, 4)
    assert parse_range("x", "3") == (3, 3, 3)
    for text in ("", "0:1:2", "2:1:3", "1:2", "1:2:3:4", "a", "-1:1:2", "1,2,3"):
        with pytest.raises(ErasecError, match="x is"):
            parse_range("x", text)
