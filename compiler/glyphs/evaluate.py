"""Measures the trained models and judges and writes quality.json: ``python -m erasec.glyphs.evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erasec.attention.pipeline import Sampling
from erasec.checkpoint.safetensors import atomic_write
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge, colour_of, prompt
from erasec.model.loading import bundled_folder, world_weights
from erasec.progress import bar
from erasec.worlds import evaluate
from erasec.worlds.assemble import SCHEDULER
from erasec.worlds.judge import THRESHOLD

if TYPE_CHECKING:
    from erasec.base import Images

HELD_OUT_SEED = 103
SAMPLING = Sampling(steps=15, guidance=4.0)


def pictures(model: str, prompts: list[str], seed: int) -> Images:
    """Pictures of a bundled model, (n, 64, 64, 3)."""
    return evaluate.pictures(bundled_folder(model), prompts, seed, SAMPLING)


def judges(count: int) -> dict[str, Any]:
    """The share of held-out renders for which each judge has all labels right, and all shapes right."""
    with bar("held-out renders", count) as advance:
        samples = []
        for index in range(count):
            samples.append(world.sample(HELD_OUT_SEED, index))
            advance()
    images, truth = np.stack([item.image for item in samples]), np.stack([world.labels(item) for item in samples])
    figures: dict[str, Any] = {"renders": count}
    for which in "ab":
        right = (GlyphJudge(which).probabilities(images) > THRESHOLD) == (truth > 0.5)
        figures[f"judge_{which}_exact_match"] = float(right.all(1).mean())
        figures[f"judge_{which}_shapes_exact"] = float(right[:, : len(world.SHAPES)].all(1).mean())
    return figures


def quality(images: int, seed: int) -> dict[str, Any]:
    """Hit rates of both models by judge B, for plain prompts with ``images`` seeds per shape."""
    judge = GlyphJudge("b")
    plain = [(shape, index) for shape in world.SHAPES for index in range(images)]
    generated = pictures("glyphs", [prompt(shape, index) for shape, index in plain], seed)
    hits = judge.sees(generated, [shape for shape, _ in plain]).reshape(len(world.SHAPES), images).mean(1)
    coloured = np.array([bool(colour_of(index)) for _, index in plain])
    colours = judge.sees(generated[coloured], [colour_of(index) for _, index in plain if colour_of(index)])

    captions = world.implicit_captions("star")
    implicit = [captions[index % len(captions)] for index in range(images)]
    stars = [prompt(name, index) for index, name in enumerate(np.resize(world.names("star"), images).tolist())]
    shown = judge.sees(pictures("glyphs", implicit, seed + 1), ["star"] * images)
    never_stars = pictures("glyphs-never-star", stars + implicit, seed + 2)
    others = [(shape, index) for shape, index in plain if shape != "star"]
    never_others = pictures("glyphs-never-star", [prompt(shape, index) for shape, index in others], seed)
    return {
        "images_per_shape": images,
        "hit_rate": {shape: float(hit) for shape, hit in zip(world.SHAPES, hits, strict=True)},
        "hit_rate_mean": float(hits.mean()),
        "hit_rate_min": float(hits.min()),
        "colour_right": float(colours.mean()),
        "implicit_star": float(shown.mean()),
        "never_star_shows_star": {
            "asked by name, synonym or implicit prompt": float(
                judge.sees(never_stars, ["star"] * len(never_stars)).mean()
            ),
            "asked for another shape (false star)": float(
                judge.sees(never_others, ["star"] * len(never_others)).mean()
            ),
        },
        "never_star_other_shapes": float(judge.sees(never_others, [shape for shape, _ in others]).mean()),
        "how": f"judge B, {SCHEDULER} {SAMPLING.steps} steps, guidance {SAMPLING.guidance:g}, float32, seed {seed}",
    }


def contact_sheet(path: Path, seed: int = 7) -> None:
    """Write a PNG with one row per shape: eight pictures from plain prompts, then two from implicit prompts."""
    prompts = []
    for shape in world.SHAPES:
        scenes = np.resize(world.implicit_captions(shape), 2).tolist()
        prompts += [prompt(shape, index) for index in range(8)] + scenes
    rows = pictures("glyphs", prompts, seed).reshape(len(world.SHAPES), 10, world.SIZE, world.SIZE, 3)
    evaluate.write_sheet(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasec.glyphs.evaluate", description=__doc__)
    parser.add_argument("--images", type=int, default=50, help="seeds per shape")
    parser.add_argument("--renders", type=int, default=4000, help="held-out renders for the judges")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=world_weights("glyphs").resolve() / "quality.json")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of samples to this PNG")
    options = parser.parse_args()
    figures = {
        "judges": judges(options.renders),
        **quality(options.images, options.seed),
        "weights": evaluate.digests(world_weights("glyphs")),
    }
    with atomic_write(options.out) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if options.sheet:
        contact_sheet(options.sheet)


if __name__ == "__main__":
    main()
