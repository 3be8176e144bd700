"""The weights of a reference world on disk: written after a training, and read to continue one on another machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from erasec.checkpoint.safetensors import atomic_write
from erasec.errors import ErasecError
from erasec.worlds import assemble
from erasec.worlds.judge import read_state

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.worlds.work import Work

PROGRESS = "training.json"  # the steps of stages that are not finished, beside the weights
UNETS = ("unet", "twin")
JUDGES = ("judge-a", "judge-b")


def pack(work: Work, out: Path) -> None:
    """Write the weights in float16: both models as diffusers folders, the judges and the contrastive pair.

    The twin has a UNet of its own. It shares the rest with the model of the whole world, where that is written once.
    Stages that have not begun are left out. ``PROGRESS`` lists the steps of those that are not finished; without any
    there is no such file. Raises ErasecError before the latents are computed, because the VAE's scale is not known.
    """
    if not work.done("latents"):
        raise ErasecError(
            f"there are no weights of {work.world.name} to write yet",
            why="the latents are not computed",
            fix="run the training on",
        )
    sizes, world = work.world.sizes, work.world
    factor = json.loads((work.root / "latents" / "factor.json").read_text())["scaling_factor"]
    text, pair = work.load("text", "text"), work.load("text", "pair")
    vae = work.load("decoder" if work.begun("decoder") else "vae", "vae")
    model = out / world.name
    shutil.copytree(work.root / "tokenizer", model / "tokenizer", dirs_exist_ok=True)
    assemble.write_pipeline(model, sizes, text, vae, factor, torch.float16)
    assemble.write_presets(model, world.name)
    for stage, name in zip(UNETS, (world.name, world.twin), strict=True):
        if work.begun(stage):
            assemble.write_unet(out / name, sizes, work.load(stage, "average"), torch.float16)
    for stage in filter(work.begun, JUDGES):
        assemble.write_half(out / "judges" / f"{stage}.safetensors", work.load(stage, "judge"))
    if sizes.pair:
        assemble.write_half(out / "judges" / "pair.safetensors", pair)
    else:
        assemble.write_clip(out / "judges" / "clip", work.root / "tokenizer", sizes, text, pair)
    unfinished = {stage: work.step(stage) for stage in (*UNETS, *JUDGES, "decoder") if not work.done(stage)}
    if unfinished:
        with atomic_write(out / PROGRESS) as temporary:
            temporary.write_text(json.dumps(unfinished, indent=2) + "\n")
    else:
        (out / PROGRESS).unlink(missing_ok=True)


def take(work: Work, weights: Path) -> list[str]:
    """Begin stages of ``work`` from the files that ``pack`` wrote, and return their names.

    Stages that have begun in ``work`` are left as they are. An unfinished stage continues at its step with new moments
    of the optimizer, because float16 weights are all that is published.
    """
    world = work.world
    model, judges = weights / world.name, weights / "judges"
    progress = json.loads((weights / PROGRESS).read_text()) if (weights / PROGRESS).is_file() else {}
    if not work.begun("text"):
        # That of the published encoder, also where the pictures are rendered here already: of two merges that are
        # equally frequent, every training of a tokenizer may take another one first.
        shutil.copytree(model / "tokenizer", work.root / "tokenizer", dirs_exist_ok=True)
    vae = {"vae": read_state(model / "vae" / assemble.WEIGHTS)}
    files: dict[str, Any] = {"text": {"text": _text(work, model), "pair": _pair(work, judges)}, "vae": vae}
    if progress.get("decoder", 1):
        files["decoder"] = vae
    for stage, name in zip(UNETS, (world.name, world.twin), strict=True):
        if (path := weights / name / "unet" / assemble.WEIGHTS).is_file():
            unet = read_state(path)
            files[stage] = {"unet": unet, "average": unet}
    for stage in JUDGES:
        if (path := judges / f"{stage}.safetensors").is_file():
            files[stage] = {"judge": read_state(path)}
    taken = [stage for stage in files if not work.begun(stage)]
    for stage in taken:
        folder = work.root / stage
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"step": progress.get(stage, work.steps(stage)), **files[stage]}, folder / "resume.pt")
        if stage not in progress:
            (folder / "done").write_text("")
    return taken


def _text(work: Work, model: Path) -> dict[str, Tensor]:
    """The text encoder's tensors under the names of the class in this version of transformers."""
    names = work.text_encoder().state_dict()
    state = read_state(model / "text_encoder" / "model.safetensors")
    return {key if key in names else key.removeprefix("text_model."): value for key, value in state.items()}


def _pair(work: Work, judges: Path) -> dict[str, Tensor]:
    """The tensors of the contrastive pair, from its own file or from the CLIPModel folder."""
    if work.world.sizes.pair:
        return read_state(judges / "pair.safetensors")
    state = read_state(judges / "clip" / "model.safetensors")
    pair = {
        f"image.{key}": value for key, value in state.items() if key.startswith(("vision_model.", "visual_projection."))
    }
    return {**pair, "text.weight": state["text_projection.weight"], "log_scale": state["logit_scale"]}
