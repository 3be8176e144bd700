"""Measure the trained world and write the figures beside the weights: ``python -m erasec.glyphs.evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from erasec.checkpoint.safetensors import atomic, file_digest
from erasec.glyphs import world
from erasec.glyphs.assemble import SCHEDULER
from erasec.glyphs.judging import THRESHOLD, GlyphJudge, colour_of, prompt
from erasec.judging.judge import Images, Sampling, generate
from erasec.model.view import bundled
from erasec.progress import bar

HELD_OUT_SEED = 103
SAMPLING = Sampling(steps=15, guidance=4.0)  # as builds do by default


def weights() -> Path:
    """The folder of the weights themselves: in a checkout that is installed as links, where the links point."""
    return (bundled("glyphs") / "model_index.json").resolve().parent.parent


def digests() -> dict[str, str]:
    """sha256 of every weights file, so that figures of other weights are seen."""
    root = weights()
    return {path.relative_to(root).as_posix(): file_digest(path) for path in sorted(root.rglob("*.safetensors"))}


def pictures(model: str, prompts: list[str], seed: int) -> Images:
    return generate(bundled(model), prompts, [seed * 1_000_003 + i for i in range(len(prompts))], SAMPLING, model)


def judges(count: int) -> dict[str, Any]:
    """Share of held-out renders that each judge reads without one wrong label, of all labels and of the shapes."""
    with bar("held-out renders", count) as advance:
        samples = []
        for index in range(count):
            samples.append(world.sample(HELD_OUT_SEED, index))
            advance()
    images, truth = np.stack([item.image for item in samples]), np.stack([world.labels(item) for item in samples])
    found: dict[str, Any] = {"renders": count}
    for which in "ab":
        right = (GlyphJudge(which).probabilities(images) > THRESHOLD) == (truth > 0.5)
        found[f"judge_{which}_exact_match"] = float(right.all(1).mean())
        found[f"judge_{which}_shapes_exact"] = float(right[:, : len(world.SHAPES)].all(1).mean())
    return found


def quality(images: int, seed: int) -> dict[str, Any]:
    """Hit rates of both models by judge B, ``images`` seeds a shape, plain prompts."""
    judge = GlyphJudge("b")
    asked = [(shape, index) for shape in world.SHAPES for index in range(images)]
    found = pictures("glyphs", [prompt(shape, index) for shape, index in asked], seed)
    hits = judge.sees(found, [shape for shape, _ in asked]).reshape(len(world.SHAPES), images).mean(1)
    coloured = np.array([bool(colour_of(index)) for _, index in asked])
    colours = judge.sees(found[coloured], [colour_of(index) for _, index in asked if colour_of(index)])

    captions = world.implicit_captions("star")
    implicit = [captions[index % len(captions)] for index in range(images)]
    stars = [prompt(name, index) for index, name in enumerate(np.resize(world.names("star"), images).tolist())]
    shown = judge.sees(pictures("glyphs", implicit, seed + 1), ["star"] * images)
    never = pictures("glyphs-never-star", stars + implicit, seed + 2)
    others = [(shape, index) for shape, index in asked if shape != "star"]
    plain = pictures("glyphs-never-star", [prompt(shape, index) for shape, index in others], seed)
    return {
        "images_per_shape": images,
        "hit_rate": {shape: float(hit) for shape, hit in zip(world.SHAPES, hits, strict=True)},
        "hit_rate_mean": float(hits.mean()),
        "hit_rate_min": float(hits.min()),
        "colour_right": float(colours.mean()),
        "implicit_star": float(shown.mean()),
        "never_star_shows_star": {
            "asked by name, synonym or implicit prompt": float(judge.sees(never, ["star"] * len(never)).mean()),
            "asked for another shape (false star)": float(judge.sees(plain, ["star"] * len(plain)).mean()),
        },
        "never_star_other_shapes": float(judge.sees(plain, [shape for shape, _ in others]).mean()),
        "how": f"judge B, {SCHEDULER} {SAMPLING.steps} steps, guidance {SAMPLING.guidance:g}, float32, seed {seed}",
    }


def contact_sheet(path: Path, seed: int = 7) -> None:
    """One row for each shape: eight plain prompts of it, then two implicit ones."""
    from PIL import Image

    prompts = []
    for shape in world.SHAPES:
        scenes = np.resize(world.implicit_captions(shape), 2).tolist()
        prompts += [prompt(shape, index) for index in range(8)] + scenes
    found = pictures("glyphs", prompts, seed).reshape(len(world.SHAPES), 10, world.SIZE, world.SIZE, 3)
    gap = 4
    cell = world.SIZE + gap
    sheet = np.full((cell * len(world.SHAPES) + gap, cell * 10 + gap, 3), 255, dtype=np.uint8)
    for row, line in enumerate(found):
        for column, image in enumerate(line):
            top, left = gap + row * cell, gap + column * cell
            sheet[top : top + world.SIZE, left : left + world.SIZE] = image
    with atomic(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasec.glyphs.evaluate", description=__doc__)
    parser.add_argument("--images", type=int, default=50, help="seeds a shape")
    parser.add_argument("--renders", type=int, default=4000, help="held-out renders for the judges")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=weights() / "quality.json")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of samples to this PNG")
    options = parser.parse_args()
    figures = {"judges": judges(options.renders), **quality(options.images, options.seed), "weights": digests()}
    with atomic(options.out) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if options.sheet:
        contact_sheet(options.sheet)


if __name__ == "__main__":
    main()
