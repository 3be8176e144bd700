"""Trains the models and judges of glyphs from scratch: ``python -m erasec.glyphs.train --work DIR``.

Training is split into stages, each with a folder of its own. An interrupted stage resumes from its last checkpoint, and
every batch depends only on (seed, step), so that an interrupted run gives the result of an uninterrupted one. On a CPU
two stages run in parallel with one thread each: a second thread does not speed up networks of this size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from erasec.checkpoint.safetensors import atomic_write, save_tensors
from erasec.glyphs import assemble, models
from erasec.glyphs.fit import Average, Modules, fit
from erasec.glyphs.world import LABELS, SIZE, labels, sample
from erasec.progress import bar

IMAGES = 40_000
JUDGE_IMAGES = 40_000
WORLD_SEED, JUDGE_SEEDS = 0, {"judge-a": 101, "judge-b": 102}
STEPS = {
    "text": 1200,
    "vae": 3000,
    "unet": 2400,
    "unet-never-star": 2400,
    "judge-a": 3000,
    "judge-b": 3000,
    "decoder": 1000,
}


def pixels(images: np.ndarray, device: str = "cpu") -> Tensor:
    """Images uint8 (n, 64, 64, 3) -> float (n, 3, 64, 64) in [-1, 1]."""
    return torch.tensor(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class Work:
    """The folder of a run, through which stages pass results to later stages."""

    def __init__(self, root: Path, device: str, seed: int, scale: float) -> None:
        self.root, self.device, self.seed, self.scale = root, device, seed, scale

    def steps(self, stage: str) -> int:
        return max(2, round(STEPS[stage] * self.scale))

    def count(self, images: int) -> int:
        return max(256, round(images * min(1.0, self.scale)))

    def done(self, stage: str) -> bool:
        return (self.root / stage / "done").exists()

    def load(self, stage: str, part: str) -> dict[str, Tensor]:
        state: dict[str, dict[str, Tensor]] = torch.load(self.root / stage / "resume.pt", weights_only=True)
        return state[part]

    def render(self, name: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """The pictures, labels and captions of one world; rendered once and then read from the folder ``name``."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "captions.json").exists():
            images = np.lib.format.open_memmap(
                folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3)
            )
            truth, captions = np.zeros((count, len(LABELS)), dtype=np.float32), []
            with bar(f"render {name}", count) as advance:
                for index in range(count):
                    item = sample(seed, index)
                    images[index], truth[index] = item.image, labels(item)
                    captions.append(item.caption)
                    advance()
            images.flush()
            np.save(folder / "labels.npy", truth)
            (folder / "captions.json").write_text(json.dumps(captions))
        captions = json.loads((folder / "captions.json").read_text())
        return np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"), captions

    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.root / "tokenizer")

    def token_ids(self, captions: list[str]) -> Tensor:
        batch = self.tokenizer()(
            captions, padding="max_length", max_length=models.POSITIONS, truncation=True, return_tensors="pt"
        )
        ids: Tensor = batch.input_ids
        return ids

    def text_encoder(self) -> Any:
        tokenizer = self.tokenizer()
        return models.text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).to(self.device)

    def vae(self) -> Any:
        vae = models.vae().to(self.device)
        vae.load_state_dict(self.load("vae", "vae"))
        return vae.eval()


def stage_render(work: Work) -> None:
    captions = work.render("render", WORLD_SEED, work.count(IMAGES))[2]
    assemble.write_tokenizer(work.root / "tokenizer", captions)


def stage_text(work: Work) -> None:
    """Train the contrastive pair. As attention is causal, captions can be cropped to the longest of the batch."""
    images, _, captions = work.render("render", WORLD_SEED, work.count(IMAGES))
    ids = work.token_ids(captions)
    ends = (ids == ids[0, -1]).float().argmax(1)
    encoder, pair = work.text_encoder(), models.Pair().to(work.device)
    weights = [*encoder.parameters(), *pair.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (256,), generator=rng)
        length = int(ends[rows].max()) + 1
        states = encoder(ids[rows, :length].to(work.device)).last_hidden_state
        text = pair.texts(states[torch.arange(len(rows)), ends[rows]])
        batch = pixels(images[rows.numpy()], work.device)
        batch = batch + 0.1 * torch.rand(1, generator=rng).item() * torch.randn(batch.shape, generator=rng).to(batch)
        logits = pair.log_scale.clamp(max=4.6).exp() * pair.images(batch) @ text.T
        # Rows of the batch with the same caption are all correct targets.
        hashes = torch.tensor([hash_of(captions[i]) for i in rows.tolist()], device=work.device)
        target = (hashes[:, None] == hashes[None, :]).float()
        target = target / target.sum(1, keepdim=True)
        contrastive: Tensor = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return contrastive

    fit(work.root / "text", work.steps("text"), 1e-3, optimizer, {"text": encoder, "pair": pair}, loss, work.seed + 1)


def hash_of(text: str) -> int:
    """A hash of a text that is the same in every process."""
    return zlib.crc32(text.encode())


def vae_loss(work: Work, vae: Any) -> Callable[[int, torch.Generator], Tensor]:
    images, _, _ = work.render("render", WORLD_SEED, work.count(IMAGES))

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (16,), generator=rng)
        batch = pixels(images[rows.numpy()], work.device)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(work.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - batch
        total: Tensor = error.abs().mean() + 2.0 * error.pow(2).mean() + 1e-6 * posterior.kl().mean()
        return total

    return loss


def stage_vae(work: Work) -> None:
    vae = models.vae().to(work.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    fit(work.root / "vae", work.steps("vae"), 2e-3, optimizer, {"vae": vae}, vae_loss(work, vae), work.seed + 2)


def stage_decoder(work: Work) -> None:
    """Fine-tune the decoder alone, so that the latents of the trained UNets stay valid."""
    vae = work.vae().to(memory_format=torch.channels_last).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    weights = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)
    parts: Modules = {"vae": vae}
    fit(work.root / "decoder", work.steps("decoder"), 1e-3, optimizer, parts, vae_loss(work, vae), work.seed + 4)


@torch.no_grad()
def stage_latents(work: Work) -> None:
    """Compute the latents and text states of all pictures in float16, the only data that the UNet trains on."""
    images, _, captions = work.render("render", WORLD_SEED, work.count(IMAGES))
    folder = work.root / "latents"
    folder.mkdir(exist_ok=True)
    vae, chunks = work.vae(), []
    with bar("latents", len(images)) as advance:
        for start in range(0, len(images), 100):
            batch = pixels(images[start : start + 100], work.device)
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(start)).to(work.device)
            chunks.append((posterior.mean + posterior.std * noise).cpu())
            advance(len(batch))
    latents = torch.cat(chunks)
    factor = 1.0 / latents.std().item()
    unique = sorted({*captions, ""})
    encoder = work.text_encoder()
    encoder.load_state_dict(work.load("text", "text"))
    ids, states = work.token_ids(unique), np.zeros((len(unique), models.POSITIONS, models.WIDTH), dtype=np.float16)
    with bar("text states", len(unique)) as advance:
        for start in range(0, len(unique), 100):
            batch = encoder.eval()(ids[start : start + 100].to(work.device)).last_hidden_state
            states[start : start + 100] = batch.half().cpu().numpy()
            advance(len(batch))
    row = {caption: index for index, caption in enumerate(unique)}
    np.save(folder / "latents.npy", (latents * factor).half().numpy())
    np.save(folder / "states.npy", states)
    np.save(folder / "rows.npy", np.array([row[caption] for caption in captions]))
    (folder / "factor.json").write_text(json.dumps({"scaling_factor": factor, "empty": row[""]}))


def train_unet(work: Work, stage: str, drop_shape: str | None) -> None:
    """Train noise prediction with min-SNR-5 weights (Hang et al., 2023), without pictures of ``drop_shape``."""
    folder = work.root / "latents"
    latents = torch.from_numpy(np.load(folder / "latents.npy"))
    states = np.load(folder / "states.npy", mmap_mode="r")
    rows = torch.from_numpy(np.load(folder / "rows.npy"))
    empty = json.loads((folder / "factor.json").read_text())["empty"]
    usable = torch.arange(len(latents))
    if drop_shape:
        truth = np.load(work.root / "render" / "labels.npy")
        usable = usable[torch.from_numpy(truth[:, LABELS.index(drop_shape)] == 0)]
    torch.manual_seed(work.seed)
    unet = models.unet().to(work.device)
    average = Average(unet, 0.998)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.01)
    steps = work.steps(stage)
    betas = torch.linspace(models.SCHEDULER["beta_start"] ** 0.5, models.SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, 0)
    weights = (5.0 / (alphas_cumprod / (1.0 - alphas_cumprod))).clamp(max=1.0)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        batch = 64 if step < 0.65 * steps else 128
        chosen = usable[torch.randint(len(usable), (batch,), generator=rng)]
        caption = rows[chosen].clone()
        caption[torch.rand(batch, generator=rng) < 0.1] = empty
        clean, t = latents[chosen].float(), torch.randint(1000, (batch,), generator=rng)
        noise, a = torch.randn(clean.shape, generator=rng), alphas_cumprod[t][:, None, None, None]
        noisy = (a.sqrt() * clean + (1.0 - a).sqrt() * noise).to(work.device)
        context = torch.from_numpy(states[caption.numpy()]).to(work.device).float()
        error = (unet(noisy, t.to(work.device), context).sample - noise.to(work.device)).pow(2).mean((1, 2, 3))
        weighted: Tensor = (weights[t].to(work.device) * error).mean()
        return weighted

    parts: Modules = {"unet": unet, "average": average}
    fit(work.root / stage, steps, 1e-3, optimizer, parts, loss, work.seed + 3, after=average.update)


def train_judge(work: Work, stage: str) -> None:
    """Train a classifier on renders of its own seed, shifted, blurred and with noise.

    About two in five pass through the VAE, because generated pictures are softer than renders. A large share of all
    renders is reconstructed, because a classifier memorises a small set.
    """
    images, truth, _ = work.render(f"render-{stage}", JUDGE_SEEDS[stage], work.count(JUDGE_IMAGES))
    folder = work.root / stage
    folder.mkdir(exist_ok=True)
    part = len(images) // 6
    if not (folder / "seen.npy").exists():
        vae, chunks = work.vae(), []
        with torch.no_grad(), bar(f"{stage}: reconstructions", part) as advance:
            for start in range(0, part, 50):
                batch = vae(pixels(images[start : min(part, start + 50)], work.device)).sample.clamp(-1, 1)
                chunks.append(((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
                advance(len(batch))
        with atomic_write(folder / "seen.npy") as temporary, temporary.open("wb") as stream:
            np.save(stream, np.concatenate(chunks))
    reconstructed, targets = np.load(folder / "seen.npy"), torch.from_numpy(truth)
    torch.manual_seed(work.seed + 5)
    judge = models.classifier(stage[-1]).to(work.device)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        through = torch.randint(part, (56,), generator=rng)
        plain = torch.randint(len(images), (72,), generator=rng)
        batch = pixels(np.concatenate([reconstructed[through.numpy()], images[plain.numpy()]]), work.device)

        def random_amounts(share: float, most: float) -> Tensor:
            """For each image of the batch an amount up to ``most``, with the probability ``share``; otherwise 0."""
            amount, chosen = torch.rand(2, len(batch), 1, 1, 1, generator=rng)
            amounts: Tensor = most * amount * (chosen < share)
            return amounts.to(batch)

        down, right = torch.randint(9, (2,), generator=rng).tolist()
        batch = F.pad(batch, (4, 4, 4, 4), mode="replicate")[:, :, down : down + SIZE, right : right + SIZE]
        noise, mix = random_amounts(0.5, 0.15), random_amounts(0.4, 1.0)
        blurred = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        batch = batch + mix * (blurred - batch)
        batch = batch + noise * torch.randn(batch.shape, generator=rng).to(batch)
        target = targets[torch.cat([through, plain])].to(work.device)
        entropy: Tensor = F.binary_cross_entropy_with_logits(judge(batch), target)
        return entropy

    fit(folder, work.steps(stage), 2e-3, optimizer, {"judge": judge}, loss, work.seed + JUDGE_SEEDS[stage])


# Each stage with the stages that it needs, and its function.
STAGES: dict[str, tuple[tuple[str, ...], Callable[[Work], None]]] = {
    "render": ((), stage_render),
    "vae": (("render",), stage_vae),
    "text": (("render",), stage_text),
    "latents": (("vae", "text"), stage_latents),
    "unet": (("latents",), lambda work: train_unet(work, "unet", None)),
    "judge-a": (("vae",), lambda work: train_judge(work, "judge-a")),
    "judge-b": (("vae",), lambda work: train_judge(work, "judge-b")),
    "unet-never-star": (("latents",), lambda work: train_unet(work, "unet-never-star", "star")),
    "decoder": (("vae",), stage_decoder),
}


def pack(work: Work, out: Path) -> None:
    """Write the published weights in float16: both checkpoints as diffusers folders, the judges and the pair.

    glyphs-never-star has a UNet of its own and shares VAE, text encoder and tokenizer with glyphs.
    """
    factor = json.loads((work.root / "latents" / "factor.json").read_text())["scaling_factor"]
    text, vae = work.load("text", "text"), work.load("decoder", "vae")
    for name, stage in (("glyphs", "unet"), ("glyphs-never-star", "unet-never-star")):
        shutil.copytree(work.root / "tokenizer", out / name / "tokenizer", dirs_exist_ok=True)
        assemble.write_pipeline(out / name, text, vae, work.load(stage, "average"), factor, torch.float16)
    for name, state in (
        ("judge-a", work.load("judge-a", "judge")),
        ("judge-b", work.load("judge-b", "judge")),
        ("pair", work.load("text", "pair")),
    ):
        half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        save_tensors(out / "judges" / f"{name}.safetensors", half)


def run_stage(work: Work, stage: str) -> None:
    torch.manual_seed(work.seed + hash_of(stage) % 1000)
    STAGES[stage][1](work)
    (work.root / stage / "done").write_text("")


def run_all(work: Work, jobs: int, arguments: list[str]) -> None:
    """Run every stage in its own process as soon as the stages that it needs are done, ``jobs`` at a time."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if jobs > 1 else None
    try:
        while not all(work.done(stage) for stage in STAGES):
            for stage, (needs, _) in STAGES.items():
                ready = all(work.done(need) for need in needs) and not work.done(stage) and stage not in running
                if ready and len(running) < jobs:
                    command = [sys.executable, "-m", "erasec.glyphs.train", *arguments, "--only", stage]
                    running[stage] = subprocess.Popen(command, env=environment)
                    print(f"{time.strftime('%H:%M:%S')} {stage} started", file=sys.stderr)
            time.sleep(1.0)
            for stage in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(stage).returncode:
                    raise SystemExit(f"{stage} failed; fix the cause and run the same command again to resume")
    finally:
        for process in running.values():
            process.terminate()


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m erasec.glyphs.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints; resumable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=None, help="stages in parallel (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and data, for a trial run")
    parser.add_argument("--out", type=Path, help="folder for the finished weights (default: WORK/weights)")
    parser.add_argument("--only", choices=sorted(STAGES), help="run only this stage, in this process")
    options = parser.parse_args(arguments)
    work = Work(options.work, options.device, options.seed, options.scale)
    work.root.mkdir(parents=True, exist_ok=True)
    if options.only:
        run_stage(work, options.only)
        return
    jobs = options.jobs or (2 if options.device == "cpu" else 1)
    run_all(work, jobs, arguments)
    pack(work, options.out or work.root / "weights")


if __name__ == "__main__":
    main()
