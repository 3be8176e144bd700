"""Trains the models and judges of a reference world: ``python -m erasec.worlds.train WORLD --work DIR``.

Training is split into stages, each with a folder of its own. An interrupted stage resumes from its last checkpoint, and
every batch depends only on (seed, step), so that an interrupted run gives the result of an uninterrupted one. On a CPU
two stages run in parallel with one thread each: a second thread does not speed up networks of this size.
"""

from __future__ import annotations

import argparse
import json
import os
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

from erasec.errors import ErasecError
from erasec.progress import bar
from erasec.worlds import assemble, networks, published
from erasec.worlds.base import WORLDS, open_world
from erasec.worlds.fit import Average, Modules, fit
from erasec.worlds.losses import spread_loss
from erasec.worlds.train_judge import train_judge
from erasec.worlds.work import Work, pixels

TEXT_BATCH = 256
GROUP = 16  # pictures of one group in a batch with hard negatives


def stage_render(work: Work) -> None:
    captions = work.images()[2]
    if not (work.root / "tokenizer").exists():
        assemble.write_tokenizer(work.root / "tokenizer", captions, work.world.sizes.vocabulary)


def text_batches(work: Work, count: int) -> Callable[[torch.Generator], Tensor]:
    """Draws rows of a batch of captions; with hard negatives half of them come in runs of one group."""
    if not work.world.hard_negatives:
        return lambda rng: torch.randint(count, (TEXT_BATCH,), generator=rng)
    groups = torch.from_numpy(np.load(work.root / "render" / "groups.npy"))
    members = [torch.nonzero(groups == group).flatten() for group in groups.unique()]

    def draw(rng: torch.Generator) -> Tensor:
        runs = []
        for _ in range(TEXT_BATCH // 2 // GROUP):
            own = members[int(torch.randint(len(members), (1,), generator=rng))]
            runs.append(own[torch.randint(len(own), (GROUP,), generator=rng)])
        return torch.cat([*runs, torch.randint(count, (TEXT_BATCH - GROUP * len(runs),), generator=rng)])

    return draw


def stage_text(work: Work) -> None:
    """Train the contrastive pair. As attention is causal, captions can be cropped to the longest of a part."""
    images, _, captions = work.images()
    token_ids, reword = work.token_ids(captions), work.world.reword
    encoder, pair = work.text_encoder(), networks.Pair(work.world.sizes).to(work.device)
    weights = [*encoder.parameters(), *pair.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)
    draw = text_batches(work, len(captions))

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = draw(rng)
        if reword is None:
            ids = token_ids[rows]
        else:
            writer = np.random.default_rng([work.seed, step])
            ids = work.token_ids([reword(writer, captions[row]) for row in rows.tolist()])
        ends = (ids == ids[0, -1]).float().argmax(1)
        order = ends.argsort(stable=True)
        rows, ids, ends = rows[order], ids[order], ends[order]
        batch = pixels(images[rows.numpy()], work.device)
        batch = batch + 0.1 * torch.rand(1, generator=rng).item() * torch.randn(batch.shape, generator=rng).to(batch)
        pooled = []
        with work.autocast():
            for part, last in zip(ids.chunk(4), ends.chunk(4), strict=True):  # from short to long captions
                states = encoder(part[:, : int(last.max()) + 1].to(work.device)).last_hidden_state
                pooled.append(states[torch.arange(len(part)), last])
            pooled_states = torch.cat(pooled)
            text, seen = pair.texts(pooled_states).float(), pair.images(batch).float()
        logits = pair.log_scale.clamp(max=4.6).exp() * seen @ text.T
        # Rows of the batch with the same caption are all correct targets.
        hashes = torch.tensor([hash_of(captions[i]) for i in rows.tolist()], device=work.device)
        target = (hashes[:, None] == hashes[None, :]).float()
        target = target / target.sum(1, keepdim=True)
        contrastive: Tensor = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return (
            contrastive + work.world.spread * spread_loss(pooled_states.float()) if work.world.spread else contrastive
        )

    parts: Modules = {"text": encoder, "pair": pair}
    fit(work.root / "text", work.steps("text"), work.world.text_rate, optimizer, parts, loss, work.seed + 1)


def hash_of(text: str) -> int:
    """A hash of a text that is the same in every process."""
    return zlib.crc32(text.encode())


def vae_loss(work: Work, vae: Any) -> Callable[[int, torch.Generator], Tensor]:
    images, _, _ = work.images()

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (16,), generator=rng)
        batch = pixels(images[rows.numpy()], work.device)
        with work.autocast():
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=rng).to(work.device)
            error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - batch
        total: Tensor = error.abs().mean() + 2.0 * error.pow(2).mean() + 1e-6 * posterior.kl().mean()
        return total

    return loss


def stage_vae(work: Work) -> None:
    vae = networks.vae(work.world.sizes).to(work.device, memory_format=torch.channels_last)
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
    images, _, captions = work.images()
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
    ids = work.token_ids(unique)
    # On disk, because the states of a world with many captions take gigabytes.
    shape = (len(unique), networks.POSITIONS, work.world.sizes.text_width)
    states = np.lib.format.open_memmap(folder / "states.npy", mode="w+", dtype=np.float16, shape=shape)
    with bar("text states", len(unique)) as advance:
        for start in range(0, len(unique), 100):
            batch = encoder.eval()(ids[start : start + 100].to(work.device)).last_hidden_state
            states[start : start + 100] = batch.half().cpu().numpy()
            advance(len(batch))
    row = {caption: index for index, caption in enumerate(unique)}
    np.save(folder / "latents.npy", (latents * factor).half().numpy())
    states.flush()
    np.save(folder / "rows.npy", np.array([row[caption] for caption in captions]))
    (folder / "factor.json").write_text(json.dumps({"scaling_factor": factor, "empty": row[""]}))


def train_unet(work: Work, stage: str, left_out: tuple[str, ...] = ()) -> None:
    """Train noise prediction with min-SNR-5 weights (Hang et al., 2023), without pictures of ``left_out``."""
    folder = work.root / "latents"
    latents = torch.from_numpy(np.load(folder / "latents.npy"))
    states = np.load(folder / "states.npy", mmap_mode="r")
    rows = torch.from_numpy(np.load(folder / "rows.npy"))
    empty = json.loads((folder / "factor.json").read_text())["empty"]
    usable = torch.arange(len(latents))
    if left_out:
        truth = np.load(work.root / "render" / "labels.npy")
        columns = [work.world.labels.index(label) for label in left_out]
        usable = usable[torch.from_numpy((truth[:, columns] == 0).all(1))]
    torch.manual_seed(work.seed)
    unet = networks.unet(work.world.sizes).to(work.device, memory_format=torch.channels_last)
    average = Average(unet, 0.998)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.01)
    steps = work.steps(stage)
    alphas_cumprod = networks.alphas_cumprod()
    weights = (5.0 / (alphas_cumprod / (1.0 - alphas_cumprod))).clamp(max=1.0)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        batch = work.world.unet_batches[step >= 0.65 * steps]
        chosen = usable[torch.randint(len(usable), (batch,), generator=rng)]
        caption = rows[chosen].clone()
        caption[torch.rand(batch, generator=rng) < 0.1] = empty
        clean, t = latents[chosen].float(), torch.randint(1000, (batch,), generator=rng)
        noise, a = torch.randn(clean.shape, generator=rng), alphas_cumprod[t][:, None, None, None]
        noisy = (a.sqrt() * clean + (1.0 - a).sqrt() * noise).to(work.device)
        context = torch.from_numpy(states[caption.numpy()]).to(work.device).float()
        with work.autocast():
            prediction = unet(noisy, t.to(work.device), context).sample.float()
        error = (prediction - noise.to(work.device)).pow(2).mean((1, 2, 3))
        weighted: Tensor = (weights[t].to(work.device) * error).mean()
        return weighted

    parts: Modules = {"unet": unet, "average": average}
    fit(work.root / stage, steps, 1e-3, optimizer, parts, loss, work.seed + 3, after=average.update)


# Each stage with the stages that it needs, and its function.
STAGES: dict[str, tuple[tuple[str, ...], Callable[[Work], None]]] = {
    "render": ((), stage_render),
    "vae": (("render",), stage_vae),
    "text": (("render",), stage_text),
    "latents": (("vae", "text"), stage_latents),
    "unet": (("latents",), lambda work: train_unet(work, "unet")),
    "judge-a": (("unet",), lambda work: train_judge(work, "judge-a")),
    "judge-b": (("unet",), lambda work: train_judge(work, "judge-b")),
    "twin": (("latents",), lambda work: train_unet(work, "twin", work.world.left_out)),
    "decoder": (("vae",), stage_decoder),
}


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
                    command = [sys.executable, "-m", "erasec.worlds.train", *arguments, "--only", stage]
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
    parser = argparse.ArgumentParser(prog="python -m erasec.worlds.train", description=__doc__)
    parser.add_argument("world", choices=sorted(WORLDS))
    parser.add_argument("--data", type=Path, help="folder of the world's arrays; glyphs needs none")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints; resumable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=None, help="stages in parallel (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and data, for a trial run")
    parser.add_argument("--out", type=Path, help="folder for the finished weights (default: WORK/weights)")
    parser.add_argument("--start", type=Path, help="folder of weights from which the stages begin that lie there")
    parser.add_argument("--pack", action="store_true", help="write what is trained so far into --out, and end")
    parser.add_argument("--only", choices=sorted(STAGES), help="run only this stage, in this process")
    parser.add_argument("--bfloat16", action="store_true", help="faster on CPUs with AMX and on GPUs")
    options = parser.parse_args(arguments)
    try:
        world = open_world(options.world, options.data)
    except ErasecError as error:
        raise SystemExit(str(error)) from None
    work = Work(world, options.work, options.device, options.seed, options.scale, options.bfloat16)
    work.root.mkdir(parents=True, exist_ok=True)
    if options.only:
        run_stage(work, options.only)
        return
    out = options.out or work.root / "weights"
    if options.pack:
        published.pack(work, out)
        return
    if options.start:
        taken = published.take(work, options.start)
        print(f"from {options.start}: {', '.join(taken) or 'nothing, all stages have begun'}", file=sys.stderr)
    jobs = options.jobs or (2 if options.device == "cpu" else 1)
    run_all(work, jobs, arguments)
    published.pack(work, out)


if __name__ == "__main__":
    main()
