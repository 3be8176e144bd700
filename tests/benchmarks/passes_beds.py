"""Passes on two small trained models of other families: emoji in the layouts of SDXL and of Stable Diffusion 3.

    python tests/benchmarks/passes_beds.py                 writes tests/benchmarks/results/passes_beds.json
    ... --beds sdxl --setups uce esd                       measures these rows again, and keeps the others
    ... --missing                                          measures only rows that the file does not have
    ... --table                                            prints the tables of docs/emoji.md
    ... --sheet FILE                                       draws what a bed paints, and measures nothing

One object is erased. The columns are shares of pictures that show what the prompt names, by judge B, with Wilson's
95 % interval: "name" and "synonym" should be 0, the others as in the first row. By "first", "second" and "pooled" the
name reaches the denoiser by one route of the text alone: the columns of one text encoder, or the pooled state; the
other routes carry the empty prompt. Every row runs in a process of its own with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from passes_emoji import cell, measure_rows
from PIL import Image

from erasec.attention.pipeline import Sampling, generate, pipeline
from erasec.base import Context
from erasec.checkpoint.safetensors import read_header, read_tensor
from erasec.commands import settings
from erasec.emoji import beds
from erasec.emoji.judge import EmojiJudge, prompt
from erasec.emoji.words import OBJECTS, neighbours
from erasec.model import loading, sidecar
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

RESULT = Path(__file__).parent / "results" / "passes_beds.json"
WEIGHTS = Path(__file__).parent.parent / "beds"
BASE = "base"
CLOSED = ("uce", "uce:routes=tokens", "rece", "mace", "project", "speed", "double_projection", "cure", "trce.remap")
LEARNED = ("esd", "trce", "kpop", "safegen", "few_shot")
SETUPS = {"sdxl": (BASE, *CLOSED, *LEARNED, "eiup"), "sd3": (BASE, *CLOSED, *LEARNED)}
GROUPS = ("name", "synonym", "first", "second", "pooled", "kept neighbours", "other neighbours", "far objects")
ROUTES = GROUPS[2:5]
OBJECT, IMAGES, SEED = "strawberry", 40, 37
SAMPLING = {"sdxl": Sampling(20, 4.0), "sd3": Sampling(20, 4.0)}

Panel = list[tuple[str, str, str]]  # group, prompt and label of each picture


def panel(kind: str) -> Panel:
    """The pictures of a bed, IMAGES of each group."""
    item, known = concepts.find(OBJECT, "emoji"), beds.BEDS[kind].objects
    close = [name for name in neighbours(OBJECT) if name in known]
    far = [name for name in known if OBJECTS[name].cluster != OBJECTS[OBJECT].cluster]
    names = {
        "name": [(OBJECT, OBJECT)],
        "synonym": [(phrase, OBJECT) for phrase in item.synonyms],
        **{route: [(OBJECT, OBJECT)] for route in ROUTES},
        "kept neighbours": [(name, name) for name in close if name in item.keep],
        "other neighbours": [(name, name) for name in close if name not in item.keep],
        "far objects": [(name, name) for name in far[:: max(1, len(far) // IMAGES)]],
    }
    rows = [
        [(group, prompt(phrase, i), label) for i, (phrase, label) in enumerate(islice(cycle(names[group]), IMAGES))]
        for group in GROUPS
    ]
    return list(chain.from_iterable(rows))


def paint(kind: str, root: Path, rows: Panel) -> np.ndarray:
    """The pictures of ``rows``: those of a group of ROUTES with the empty prompt in all routes but one."""
    groups, texts = [row[0] for row in rows], [row[1] for row in rows]
    seeds = [SEED * 1_000_003 + index for index in range(len(rows))]
    plain = [index for index, group in enumerate(groups) if group not in ROUTES]
    images = np.zeros((len(rows), 64, 64, 3), np.uint8)
    images[plain] = generate(
        root, [texts[i] for i in plain], [seeds[i] for i in plain], SAMPLING[kind], f"{kind} {root.name}"
    )
    pipe = pipeline(root)
    pipe.set_progress_bar_config(disable=True)
    for route in ROUTES:
        chosen = [index for index, group in enumerate(groups) if group == route]
        images[chosen] = paint_route(pipe, kind, route, [texts[i] for i in chosen], [seeds[i] for i in chosen])
    return images


@torch.no_grad()
def paint_route(pipe: Any, kind: str, route: str, texts: list[str], seeds: list[int]) -> np.ndarray:
    """Pictures of prompts that reach the denoiser by one route of ROUTES alone."""
    if not texts:
        return np.zeros((0, 64, 64, 3), np.uint8)
    second = {"prompt_2": None} | ({"prompt_3": None} if kind == "sd3" else {})

    def encoded(prompts: list[str]) -> list[torch.Tensor]:
        """States, states of the negative prompt, and both pooled."""
        return list(pipe.encode_prompt(prompt=prompts, do_classifier_free_guidance=True, **second))

    # A space is the empty prompt, where SDXL's pipeline would take zeros.
    states, negative, pooled, negative_pooled = encoded(texts)
    blank, _, blank_pooled, _ = encoded([" "] * len(texts))
    columns = {"first": slice(0, beds.WIDTH), "second": slice(beds.WIDTH, None), "pooled": slice(0, 0)}[route]
    blank[..., columns] = states[..., columns]
    images = pipe(
        prompt_embeds=blank,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled if route == "pooled" else blank_pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        num_inference_steps=SAMPLING[kind].steps,
        guidance_scale=SAMPLING[kind].guidance,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    rounded: np.ndarray = (images * 255).round().astype(np.uint8)
    return rounded


def bed_folder(kind: str, scratch: Path, weights: Path | None = None) -> Path:
    """The trained bed as a diffusers folder."""
    root = scratch / beds.BEDS[kind].name
    if not (root / "model_index.json").is_file():
        entries = read_header(weights or WEIGHTS / f"{kind}.safetensors")[0]
        beds.write_folder(kind, root, {key: read_tensor(entry).float() for key, entry in entries.items()})
    return root


def measure(kind: str, setup: str, scratch: Path) -> dict[str, Any]:
    """One row: hits and counts by group, drift of the far objects, and the seconds of solving."""
    rows, row = panel(kind), dict[str, Any]()
    root = bed_folder(kind, scratch)
    kept = scratch / f"{kind}.npy"
    if not kept.exists():
        np.save(kept, paint(kind, root, rows))
    before = after = np.load(kept)
    if setup != BASE:
        base, item = loading.load(str(root)), concepts.find(OBJECT, "emoji")
        view, began = base, time.process_time()
        step = settings.settle([recipe.parse_named_options(setup)], [item], settings.defaults_of(base))[0].step
        for edit in step.solve_all(view, [item], Context(seed=SEED)):
            view = view.with_edit(edit)
        row["seconds"] = time.process_time() - began
        with tempfile.TemporaryDirectory() as folder:
            edited = Path(folder) / "bundle"
            base.source.write(edited, view.merged(), link=True)
            sidecar.write_extras(edited, sidecar.gather_extras(view.edits))
            after = paint(kind, edited, rows)
    groups = np.array([row[0] for row in rows])
    seen = EmojiJudge().sees(after, [row[2] for row in rows])
    row["shows"] = {group: [int(seen[groups == group].sum()), int((groups == group).sum())] for group in GROUPS}
    far = groups == "far objects"
    row["drift"] = float(np.abs(after[far].astype(np.float64) - before[far]).mean() / 255)
    return row


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, one table for each bed."""
    parts = []
    for kind, rows in result["rows"].items():
        parts += [f"**{kind}**", "", f"| pass | {' | '.join(GROUPS)} | drift | seconds |"]
        parts.append("|---" * (len(GROUPS) + 3) + "|")
        for setup, row in rows.items():
            cells = [cell(*row["shows"][group]) for group in GROUPS]
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else "–"
            parts.append(f"| `{setup}` | {' | '.join(cells)} | {row['drift']:.3f} | {seconds} |")
        parts.append("")
    return "\n".join(parts)


def sheet(kind: str, path: Path, weights: Path | None) -> None:
    """A contact sheet of the objects of a bed, and the judge's hit rate on it."""
    names = beds.BEDS[kind].objects[:96]
    with tempfile.TemporaryDirectory() as folder:
        root = bed_folder(kind, Path(folder), weights)
        images = generate(root, [prompt(name, 1) for name in names], [*range(len(names))], SAMPLING[kind], kind)
    hits = EmojiJudge().sees(images, names)
    print(f"{kind}: {hits.mean():.0%} of {len(names)} objects, one picture each")
    columns = 12
    canvas = Image.new("RGB", (64 * columns, 64 * -(-len(names) // columns)), "white")
    for index, image in enumerate(images):
        canvas.paste(Image.fromarray(image), (64 * (index % columns), 64 * (index // columns)))
    canvas.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", choices=[*SETUPS], default=[*SETUPS])
    parser.add_argument("--setups", nargs="*", default=[])
    parser.add_argument("--missing", action="store_true", help="measure only rows that the file does not have")
    parser.add_argument("--table", action="store_true", help="print the tables of the file, and measure nothing")
    parser.add_argument("--sheet", type=Path, help="draw what the first of --beds paints to this PNG")
    parser.add_argument("--weights", type=Path, help="with --sheet: the weights of the bed")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    if options.table:
        print(table(result))
        return
    if options.sheet:
        sheet(options.beds[0], options.sheet, options.weights)
        return
    pending = [(kind, setup) for kind in options.beds for setup in options.setups or SETUPS[kind]]
    if options.missing:
        pending = [(kind, setup) for kind, setup in pending if setup not in result["rows"].get(kind, {})]
    measure_rows(measure, pending, result, options.out, object=OBJECT, images=IMAGES, seed=SEED)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that measure
    main()
