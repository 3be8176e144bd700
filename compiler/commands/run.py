"""``erasec run``: the paths and the writing of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.staging import output
from erasec.errors import ErasecError
from erasec.model.cuts import where_cut
from erasec.runtime.backends import carried_text

if TYPE_CHECKING:
    from erasec.base import Images
    from erasec.runtime.bundle import Bundle


def picture_paths(out: Path, count: int) -> list[Path]:
    """The paths of ``count`` pictures: ``out``, or for several pictures x-0.png, x-1.png and so on.

    Raises ErasecError if Pillow does not write files with that suffix.
    """
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(out.suffix.lower()) not in Image.SAVE:
        raise ErasecError(
            f"a picture cannot be written to {out.name}",
            why=f"the suffix {out.suffix!r} is not one that Pillow writes",
            fix="give a name that ends in .png, .jpg or .webp",
        )
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(count)]


def cut_notes(bundle: Bundle, prompt: str, negative: str | None) -> list[str]:
    """A sentence for each of the two prompts of which a text encoder reads only the beginning.

    A ``negative`` of None is the bundle's own negative prompt.
    """
    notes = []
    if negative is None:
        negative = carried_text(bundle.root)[0]
    for what, text in (("prompt", prompt), ("negative prompt", negative)):
        if cut := where_cut(bundle.text_read(text), text):
            notes.append(f"the {what} is cut: {cut}.")
    return notes


def save_pictures(images: Images, paths: Sequence[Path]) -> None:
    """Write images (n, height, width, 3) to ``paths``. Each file is written completely or not at all."""
    from PIL import Image

    for image, path in zip(images, paths, strict=True):
        with output(path) as own:
            Image.fromarray(image).save(own.stage, Image.registered_extensions()[path.suffix.lower()])
            own.publish()
