"""Image files as tensors: what is cropped and scaled, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erasec.errors import ErasecError
from erasec.training.images import read_image, to_pixels, to_square_tensor


def stripes(width: int, height: int) -> Image.Image:
    """Three stripes of equal width: red, green, blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for channel in range(3):
        pixels[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return Image.fromarray(pixels)


def test_an_image_is_read_in_rgb_whatever_its_mode(tmp_path: Path) -> None:
    for mode, colour in (("RGB", (10, 20, 30)), ("RGBA", (10, 20, 30, 255)), ("L", 20), ("P", 0)):
        Image.new(mode, (5, 4), colour).save(tmp_path / f"{mode}.png")
        image = read_image(tmp_path / f"{mode}.png")
        assert (image.mode, image.size) == ("RGB", (5, 4))
    assert read_image(tmp_path / "RGBA.png").getpixel((0, 0)) == (10, 20, 30)


def test_a_missing_image_is_an_error_that_names_the_table_that_lists_it(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match=r"there is no image a\.png") as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.why == ""
    with pytest.raises(ErasecError, match=r"there is no image a\.png") as caught:
        read_image(tmp_path / "a.png", listed_in="boxes.csv")
    assert caught.value.why == "boxes.csv lists it"
    assert caught.value.where == str(tmp_path / "a.png")


def test_a_file_that_is_no_image_or_is_cut_off_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    stripes(60, 40).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    # For these, PIL raises SyntaxError and ValueError.
    (tmp_path / "chunk.png").write_bytes(content.replace(b"IDAT", b"[[[["))
    (tmp_path / "header.png").write_bytes(content[:11] + b"\5" + content[12:])
    for name in ("text.png", "cut.png", "chunk.png", "header.png", ""):
        with pytest.raises(ErasecError, match="is not an image that can be read") as caught:
            read_image(tmp_path / name)
        assert caught.value.why


def test_an_image_of_too_many_pixels_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stripes(60, 40).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ErasecError, match=r"large\.png is not an image that can be read"):
        read_image(tmp_path / "large.png")


def test_a_square_of_the_right_size_keeps_its_values() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tensor = to_square_tensor(Image.fromarray(pixels), 32)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    assert float(to_square_tensor(Image.new("RGB", (4, 4), (255, 255, 255)), 4).min()) == 1
    assert float(to_square_tensor(Image.new("RGB", (4, 4)), 4).max()) == -1


@pytest.mark.parametrize("size", [16, 64, 96])
def test_the_centre_square_is_what_is_left(size: int) -> None:
    """Of 96 x 64 pixels columns 16 to 80 are left: half the red, all the green, half the blue."""
    wide = to_square_tensor(stripes(96, 64), size)
    assert wide.shape == (3, size, size)
    row = wide[:, size // 2].argmax(0)
    assert (row == 0).sum() == (row == 2).sum() == size // 4
    assert (row == 1).sum() == size // 2
    high = to_square_tensor(stripes(96, 64).transpose(Image.Transpose.TRANSPOSE), size)
    assert torch.allclose(high, wide.transpose(1, 2), atol=2 / 127.5)


def test_pixels_are_the_bytes_of_the_tensor_and_stay_in_place() -> None:
    bytes_ = np.random.default_rng(1).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(bytes_).permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = to_pixels(tensor)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, bytes_)
    square = Image.fromarray(pixels[0, :5])
    assert torch.equal(to_square_tensor(square, 5), tensor[0, :, :5])
