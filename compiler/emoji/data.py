"""Renders the icons of the emoji world: ``python -m erasec.emoji.data PACKAGES --out DIR``.

PACKAGES is a folder with the unpacked npm packages of ``SOURCES``; ``examples/emoji_packages.sh`` fetches them. Nothing
is downloaded here. Versions and digests are checked, because other icons would be another world.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.safetensors import atomic_write
from erasec.emoji.words import ARTISTS, OBJECTS
from erasec.errors import ErasecError
from erasec.progress import bar

# Each icon set: version and sha256 of its icons.json.
SOURCES: dict[str, tuple[str, str]] = {
    "noto": ("1.2.9", "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6"),
    "twemoji": ("1.2.5", "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242"),
    "fluent-emoji-flat": ("1.2.6", "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63"),
    "noto-v1": ("1.2.5", "ce70d8aa90345cf389875c3571ecd245bd943401822a0c5a0f62336bf8487333"),
}
SIDE = 96  # pixels of a rendered icon
CANVAS = 128  # with room for rotation


def read_set(packages: Path, name: str) -> dict[str, Any]:
    """The content of a set's icons.json, once its version and digest are those of ``SOURCES``."""
    version, digest = SOURCES[name]
    folder = next((p for p in (packages / name, packages / "@iconify-json" / name) if p.is_dir()), packages / name)
    fix = "fetch the packages with examples/emoji_packages.sh"
    try:
        content = (folder / "icons.json").read_bytes()
        version_here = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError) as error:
        raise ErasecError(f"the icon set {name} cannot be read", why=str(error), where=str(folder), fix=fix) from error
    if (version_here, hashlib.sha256(content).hexdigest()) != (version, digest):
        raise ErasecError(
            f"{name} is not the icon set that the emoji world was made from",
            why=f"version {version} with sha256 {digest[:16]}… is needed, and this is version {version_here}, "
            f"sha256 {hashlib.sha256(content).hexdigest()[:16]}…",
            where=str(folder),
            fix=fix,
        )
    icons: dict[str, Any] = json.loads(content)
    return icons


def svg(icons: dict[str, Any], name: str) -> str:
    """One icon of a set as an SVG document. Names that are aliases are followed to their icons."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0))]
    size = [icon.get(key, icons.get(key, 16)) for key in ("width", "height")]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size[0]}" height="{size[1]}" viewBox="{box[0]} {box[1]} {size[0]} {size[1]}">{icon["body"]}</svg>'
    )


def render(document: str) -> NDArray[np.uint8]:
    """An SVG document in the middle of a transparent canvas: RGBA with premultiplied alpha, (128, 128, 4)."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=document, width=SIDE, height=SIDE))
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.uint16)
    alpha = picture[..., 3:]
    picture[..., :3] = (picture[..., :3] * alpha + 127) // 255
    canvas = np.zeros((CANVAS, CANVAS, 4), dtype=np.uint8)
    top, left = (CANVAS - picture.shape[0]) // 2, (CANVAS - picture.shape[1]) // 2
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def render_all(packages: Path) -> NDArray[np.uint8]:
    """Every object by every artist, (objects, artists, 128, 128, 4), in the order of OBJECTS and ARTISTS."""
    icons = np.zeros((len(OBJECTS), len(ARTISTS), CANVAS, CANVAS, 4), dtype=np.uint8)
    with bar("render icons", len(OBJECTS) * len(ARTISTS)) as advance:
        for column, source in enumerate(ARTISTS.values()):
            content = read_set(packages, source)
            for row, item in enumerate(OBJECTS.values()):
                icons[row, column] = render(svg(content, item.icon))
                advance()
    return icons


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasec.emoji.data", description=__doc__)
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages, one folder each")
    parser.add_argument("--out", type=Path, required=True, help="folder for icons.npy")
    options = parser.parse_args()
    icons = render_all(options.packages)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.out / "icons.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, icons)
    print(f"{options.out / 'icons.npy'}: {icons.shape}, sha256 {hashlib.sha256(icons.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
