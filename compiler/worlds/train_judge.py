"""Trains the judges of a reference world: classifiers of renders that must also read softer, generated pictures."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasec.checkpoint.safetensors import atomic_write
from erasec.progress import bar
from erasec.worlds import networks
from erasec.worlds.fit import fit
from erasec.worlds.work import SIZE, Work, pixels

SEEDS = {"judge-a": 101, "judge-b": 102}
BATCH = 50  # pictures that are copied at once
REDRAW_STEPS = 4
STRENGTHS = (100, 400)  # timesteps; from 500 on many pictures show something else
PATCH = 8  # side of the patches that are shuffled into a picture of nothing


def shuffled(images: Tensor, rng: torch.Generator) -> Tensor:
    """The images (n, 3, 64, 64) cut into patches of 8x8 pixels, and these in random order."""
    patches = F.unfold(images, PATCH, stride=PATCH)
    return F.fold(patches[:, :, torch.randperm(patches.shape[2], generator=rng)], (SIZE, SIZE), PATCH, stride=PATCH)


def redraw(unet: nn.Module, latents: Tensor, states: Tensor, strength: int, rng: torch.Generator) -> Tensor:
    """Latents (n, 4, h, w) with the noise of timestep ``strength``, denoised by the UNet with the states of no caption.

    DDIM without guidance (Song et al., 2021, equation 12). Without a caption the UNet can only draw what the latents
    still show, so the labels of the render stay those of the picture.
    """
    alphas = networks.alphas_cumprod()
    steps = torch.linspace(strength, 0, REDRAW_STEPS + 1).long()
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    noisy = alphas[strength].sqrt() * latents + (1.0 - alphas[strength]).sqrt() * noise
    for now, after in pairwise(steps):
        prediction = unet(noisy, now, states).sample.float()
        clean = (noisy - (1.0 - alphas[now]).sqrt() * prediction) / alphas[now].sqrt()
        noisy = alphas[after].sqrt() * clean + (1.0 - alphas[after]).sqrt() * prediction
    return noisy


@torch.no_grad()
def soft_copies(work: Work, stage: str, images: np.ndarray) -> np.ndarray:
    """The images (n, 64, 64, 3) reconstructed by the VAE; the base UNet redraws the world's share ``redrawn`` of them,
    because its mistakes are not those of the VAE."""
    vae, chunks = work.vae(), []
    if work.world.redrawn:
        factor = json.loads((work.root / "latents" / "factor.json").read_text())["scaling_factor"]
        unet = networks.unet(work.world.sizes).to(work.device)
        unet.load_state_dict(work.load("unet", "average"))
        unet.eval()
        encoder = work.text_encoder()
        encoder.load_state_dict(work.load("text", "text"))
        states = encoder.eval()(work.token_ids([""]).to(work.device)).last_hidden_state
    with bar(f"{stage}: soft copies", len(images)) as advance:
        for start in range(0, len(images), BATCH):
            latents = vae.encode(pixels(images[start : start + BATCH], work.device)).latent_dist.mean
            if work.world.redrawn:
                rng = torch.Generator().manual_seed(start)
                count = round(work.world.redrawn * len(latents))
                strength = int(torch.randint(*STRENGTHS, (), generator=rng))
                with work.autocast():
                    own = latents[:count] * factor
                    latents[:count] = redraw(unet, own, states.expand(count, -1, -1), strength, rng) / factor
            batch = vae.decode(latents).sample.clamp(-1, 1)
            chunks.append(((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
            advance(len(batch))
    return np.concatenate(chunks)


def train_judge(work: Work, stage: str) -> None:
    """Train a classifier on renders of its own seed, shifted, blurred and with noise.

    About two in five are soft copies, because generated pictures are softer than renders. A large share of all renders
    is copied, because a classifier memorises a small set. A share of the batch is cut into patches that are shuffled:
    pictures of nothing, for which the judge must stay silent.
    """
    images, truth, _ = work.render(f"render-{stage}", SEEDS[stage], work.count(work.world.judge_images))
    folder = work.root / stage
    folder.mkdir(exist_ok=True)
    part = len(images) // 6
    if not (folder / "seen.npy").exists():
        copies = soft_copies(work, stage, images[:part])
        with atomic_write(folder / "seen.npy") as temporary, temporary.open("wb") as stream:
            np.save(stream, copies)
    reconstructed, targets = np.load(folder / "seen.npy"), torch.from_numpy(truth)
    torch.manual_seed(work.seed + 5)
    judge = networks.classifier(stage[-1], work.world.sizes, len(work.world.labels)).to(work.device)
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
        if work.world.garbage:
            garbage = torch.randperm(len(batch), generator=rng)[: round(work.world.garbage * len(batch))]
            batch[garbage], target[garbage] = shuffled(batch[garbage], rng), 0.0
        entropy: Tensor = F.binary_cross_entropy_with_logits(judge(batch), target)
        return entropy

    fit(folder, work.steps(stage), 2e-3, optimizer, {"judge": judge}, loss, work.seed + SEEDS[stage])
