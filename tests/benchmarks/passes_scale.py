"""Every learned pass at Stable Diffusion 1.4's full size, on random weights: two real steps, and what they held.

    python tests/benchmarks/passes_scale.py                writes tests/benchmarks/results/passes_scale.json
    ... --device cuda                                      steps a second in bfloat16, beside a plain loop of two UNets

Batch 1, latents 64 x 64, everything else at the pass's defaults but the numbers of pictures and trajectories, on
which memory hardly depends, and few_shot's guard of kept prompts, which weights that mean nothing do not pass. Each
pass has its own process; peak memory is its largest resident size, libraries included, and on a GPU torch's largest
allocation. The plain loop is ESD's as published: a frozen and a trained UNet, both whole and in float32, the
cross-attention trained. On a CPU it is left out unless --plain asks for it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine
import random_models

from erasec import registry
from erasec.base import Context
from erasec.model import loading
from erasec.options import configure
from erasec.recipe.concept import Concept

RESULT = Path(__file__).parent / "results" / "passes_scale.json"
PASSES = ("esd", "kpop", "safegen", "trce.steer", "few_shot", "geom_erasing")
# few_shot's guard stops at the first step of a text encoder of random weights: "cosine" and "worse" leave it out.
SMALL = {"trajectories": 1, "path": 2, "images": 1, "batch": 1, "prompt_steps": 1, "cosine": 0.0, "worse": 0.0}
PLAIN = "plain two-UNet loop"
CONCEPT = Concept(name="nudity", erase=("nudity",), anchor="a dressed person", keep=("a church",), kind="safety")


def options(name: str, steps: int) -> dict[str, Any]:
    """The small values of those options that a pass has."""
    known = {field.name for field in fields(registry.load_pass(name))}  # type: ignore[arg-type]
    return {key: value for key, value in {**SMALL, "steps": steps}.items() if key in known}


def measure(name: str, root: str, steps: int, device: str) -> dict[str, Any]:
    import torch

    base, began = loading.load(root), time.perf_counter()
    if name == PLAIN:
        pace = plain(root, steps, device)
        record: dict[str, Any] = {}
    else:
        step = configure(registry.load_pass(name), {**options(name, steps), **extra(name, root)}, name)
        edit = step.solve(base, CONCEPT, Context(device=device))
        pace = edit.stats.get("steps", 0.0) / max(time.perf_counter() - began, 1e-9)
        record = {"stats": dict(edit.stats)}
    record["seconds"] = time.perf_counter() - began
    record["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device != "cpu":
        record |= {"steps_per_second": pace, "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9}
    return record


def extra(name: str, root: str) -> dict[str, Any]:
    """Pictures, for the passes that read some: noise, as nothing judges what random weights paint."""
    import numpy as np
    from PIL import Image

    if name not in PICTURES:
        return {}
    folder = Path(root).parent / name
    rng = np.random.default_rng(0)
    for part in PICTURES[name]:
        path = folder / part
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            path.write_text("file,left,top,right,bottom\n0.png,10,10,120,120\n")
        else:
            Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(path)
    return {OPTION[name]: str(folder)}


PICTURES = {
    "safegen": ("concept/0.png", "censored/0.png", "benign/0.png"),
    "few_shot": ("0.png",),
    "geom_erasing": ("0.png", "boxes.csv"),
}
OPTION = {"safegen": "triplets", "few_shot": "folder", "geom_erasing": "boxes"}


def plain(root: str, steps: int, device: str) -> float:
    """Steps a second of ESD's loop with two whole UNets in float32; its trajectories are not counted."""
    import torch
    from diffusers import UNet2DConditionModel

    teacher, student = (UNet2DConditionModel.from_pretrained(Path(root) / "unet").float().to(device) for _ in range(2))
    teacher.requires_grad_(False)
    for name, weight in student.named_parameters():
        weight.requires_grad_(".attn2." in name)
    optimizer = torch.optim.Adam([weight for weight in student.parameters() if weight.requires_grad], 1e-5)
    latents, text = torch.randn(1, 4, 64, 64, device=device), torch.randn(2, 77, 768, device=device)

    def step() -> None:
        with torch.no_grad():
            conditional, unconditional = (
                teacher(latents, 500, encoder_hidden_states=text[i : i + 1]).sample for i in range(2)
            )
        loss = (
            (student(latents, 500, encoder_hidden_states=text[:1]).sample - (2 * unconditional - conditional))
            .square()
            .mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # the first one also sets up what all others use
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="*", default=list(PASSES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    rows = json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else {}
    names = [*chosen.passes, *([PLAIN] if chosen.plain or chosen.device != "cpu" else [])]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "sd14"
        random_models.random_folder(root, "sd1", "full", dtype="float16")
        for name in names:
            with get_context("spawn").Pool(1) as pool:
                rows[name] = pool.apply(measure, (name, str(root), chosen.steps, chosen.device))
            print(f"{name}: {rows[name]['peak_gb']:.1f} GB, {rows[name]['seconds']:.0f} s", flush=True)
            content = {"rows": rows, "steps": chosen.steps, "device": chosen.device, "machine": machine.about()}
            chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
