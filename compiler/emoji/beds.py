"""Two small models of the emoji world in the layouts of Stable Diffusion XL and Stable Diffusion 3.

    python -m erasec.emoji.beds sdxl --data data --work work               trains; resumable
    python -m erasec.emoji.beds sdxl --weights FILE --out FOLDER           writes the model as a diffusers folder

They prove what erasing does on these families, as ``emoji`` does for Stable Diffusion 1. Both have the VAE of emoji, so
that its judges know their pictures, and two text encoders: the text half of emoji's CLIP, without and with its
projection. Only the denoiser is trained, through the interface by which passes train. The UNet of ``sdxl`` begins with
the tensors of emoji's that have its shapes, and learns all objects; the transformer of ``sd3`` begins from random
weights, and learns ``FEW`` objects by one artist. It has no T5, as the smaller files of Stable Diffusion 3 have none.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from erasec.base import Context
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.emoji.words import ARTISTS, OBJECTS
from erasec.emoji.world import sample
from erasec.model import loading
from erasec.model.loading import bundled_folder, world_weights
from erasec.progress import bar
from erasec.training.denoiser import Denoiser
from erasec.training.schedules import FlowSchedule
from erasec.worlds import assemble, networks
from erasec.worlds.fit import Average, fit
from erasec.worlds.work import pixels

LAYERS = 5  # of a text encoder: emoji's four, and one that passes on its input, as both families read the last but one
WIDTH = 192
FEW = tuple(name for name, item in OBJECTS.items() if item.cluster in ("bird", "fruit", "pet", "instrument"))
BATCH = 32
ALONE = 0.3  # share of the captions of which not all routes of the text reach the denoiser


@dataclass(frozen=True)
class Bed:
    """A model: the folder of its denoiser, the objects and artists that it learns, how many pictures and steps, the
    learning rate, and the longest prompt in tokens."""

    name: str
    denoiser: str
    objects: tuple[str, ...]
    artists: tuple[str, ...]
    images: int
    steps: int
    rate: float
    tokens: int


BEDS = {
    "sdxl": Bed("emoji-sdxl", "unet", tuple(OBJECTS), tuple(ARTISTS), 16_000, 4000, 5e-4, 77),
    "sd3": Bed("emoji-sd3", "transformer", FEW, ("Twemoji",), 8_000, 6000, 1e-3, 32),
}


def build_denoiser(kind: str) -> Any:
    """The untrained denoiser."""
    import diffusers

    torch.manual_seed(0)
    if kind == "sdxl":
        return diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 224),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 1, 2),
            norm_num_groups=16,
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=WIDTH + 6 * 32,
        )
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        caption_projection_dim=192,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def begin_with_emoji(unet: Any) -> int:
    """Give a UNet the tensors of emoji's that have its names and shapes; a matrix may be a convolution there. Returns
    how many."""
    state, taken = unet.state_dict(), 0
    for name, entry in read_header(bundled_folder("emoji") / "unet" / assemble.WEIGHTS)[0].items():
        value = read_tensor(entry).float()
        value = value[..., 0, 0] if name in state and value.ndim > state[name].ndim else value
        if name in state and value.shape == state[name].shape:
            state[name], taken = value, taken + 1
    unet.load_state_dict(state)
    return taken


def text_encoders(kind: str) -> tuple[Any, Any]:
    """Both text encoders: the text half of emoji's CLIP, and a last layer that adds nothing to its input."""
    import transformers

    clip = transformers.CLIPModel.from_pretrained(world_weights("emoji") / "judges" / "clip").float()
    config = {
        **clip.config.text_config.to_dict(),
        "num_hidden_layers": LAYERS,
        "projection_dim": WIDTH,
        "dtype": "float32",
    }
    projected = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    source = {key.removeprefix("text_model."): value for key, value in clip.text_model.state_dict().items()}
    target = projected.text_model.state_dict()
    for name in target:
        own = name.removeprefix("text_model.")
        if own in source:
            target[name] = source[own]
        elif own.startswith(f"encoder.layers.{LAYERS - 1}.") and ("out_proj" in own or "fc2" in own):
            target[name] = torch.zeros_like(target[name])
    projected.text_model.load_state_dict(target)
    projected.text_projection.weight.data.copy_(clip.text_projection.weight.data)
    if kind == "sd3":
        return projected, projected
    plain = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    known = plain.state_dict()
    own_state = projected.text_model.state_dict()
    plain.load_state_dict({name: own_state[name.removeprefix("text_model.")] for name in known})
    return plain, projected


def write_folder(kind: str, out: Path, state: dict[str, Tensor]) -> None:
    """Write the model as a diffusers folder; ``state`` are the tensors of its denoiser."""
    import diffusers

    bed, emoji = BEDS[kind], bundled_folder("emoji")
    denoiser = build_denoiser(kind)
    denoiser.load_state_dict(state)
    first, second = text_encoders(kind)
    words = assemble.tokenizer(emoji / "tokenizer")
    parts: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL.from_pretrained(emoji / "vae"),
        "text_encoder": first,
        "text_encoder_2": second,
        "tokenizer": words,
        "tokenizer_2": words,
        bed.denoiser: denoiser,
    }
    if kind == "sdxl":
        options = {
            key: value for key, value in networks.SCHEDULER.items() if key not in ("algorithm_type", "solver_order")
        }
        pipe: Any = diffusers.StableDiffusionXLPipeline(
            scheduler=diffusers.EulerDiscreteScheduler(**options), add_watermarker=False, **parts
        )
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = diffusers.StableDiffusion3Pipeline(scheduler=scheduler, text_encoder_3=None, tokenizer_3=None, **parts)
    pipe.save_pretrained(out)
    for name, pad in (("tokenizer", networks.END), ("tokenizer_2", "!")):
        shutil.rmtree(out / name)
        shutil.copytree(emoji / "tokenizer", out / name)
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            content = json.loads((out / name / file).read_text())
            content["pad_token"] = pad
            if "model_max_length" in content:
                content["model_max_length"] = bed.tokens
            (out / name / file).write_text(json.dumps(content, indent=2) + "\n")
    index = json.loads((out / "model_index.json").read_text())
    index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    # The very file of emoji's VAE, by which its judges know a model, and the shift that pipelines of flows read.
    shutil.copy(emoji / "vae" / assemble.WEIGHTS, out / "vae" / assemble.WEIGHTS)
    config = json.loads((out / "vae" / "config.json").read_text()) | {"shift_factor": 0.0}
    (out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def pictures(icons: Any, bed: Bed) -> tuple[Any, list[str]]:
    """The first pictures of the world that show nothing but the bed's objects, by its artists, uint8 (n, 64, 64, 3),
    and their captions."""
    images, captions, index = [], [], 0
    known: Collection[str] = set(bed.objects)
    with bar(f"pictures of {bed.name}", bed.images) as advance:
        while len(images) < bed.images:
            item = sample(icons, 0, index)
            index += 1
            if known.issuperset(item.objects) and item.artist in ("", *bed.artists) and item.caption.count(",") < 4:
                images.append(item.image)
                captions.append(item.caption)
                advance()
    return np.stack(images), captions


def route_masks(rows: int) -> Tensor:
    """Which numbers of a text state (rows, width) reach the denoiser by each of three routes: the columns of the first
    encoder, those of the second, and the row of the pooled state. Boolean (3, rows, width)."""
    masks = torch.zeros(3, rows, 2 * WIDTH, dtype=torch.bool)
    masks[0, :-1, :WIDTH] = masks[1, :-1, WIDTH:] = masks[2, -1] = True
    return masks


def predict(denoiser: Denoiser, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """``denoiser.predict``, faster where the text states of ``sd3`` end with the zeros in place of T5's.

    Text tokens have no positions, so equal ones stay equal in all blocks: one of them, with the logarithm of their
    number added to its logits, gives the same as all.
    """
    zeros = int((states[0].flip(0)[1:].abs().sum(1) > 0).float().argmax())
    if zeros < 2:
        return denoiser.predict(latents, timesteps, states)
    attend = functional.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        bias = torch.zeros(key.shape[-2])
        bias[-1] = math.log(zeros)  # text tokens stand behind those of the picture, and the zeros behind the others
        return attend(query, key, value, attn_mask=bias.expand(query.shape[-2], -1), **options)

    functional.scaled_dot_product_attention = counted
    try:
        return denoiser.predict(latents, timesteps, torch.cat([states[:, :-zeros], states[:, -1:]], 1))
    finally:
        functional.scaled_dot_product_attention = attend


def train(kind: str, data: Path, work: Path, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Train the denoiser, and return the moving average of its tensors."""
    bed, folder = BEDS[kind], work / BEDS[kind].name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model_index.json").is_file():
        untrained = build_denoiser(kind)
        if kind == "sdxl":
            print(f"{begin_with_emoji(untrained)} tensors of emoji's UNet")
        write_folder(kind, folder / "model", untrained.state_dict())
    if not (folder / "captions.json").is_file():
        images, captions = pictures(np.load(data / "icons.npy", mmap_mode="r"), bed)
        np.save(folder / "images.npy", images)
        (folder / "captions.json").write_text(json.dumps(captions))
    captions = json.loads((folder / "captions.json").read_text())
    denoiser = Denoiser(loading.load(str(folder / "model")), Context(seed=seed))
    latents = torch.cat(
        [denoiser.encode(pixels(part)) for part in np.array_split(np.load(folder / "images.npy"), bed.images // 64)]
    )
    network, schedule = denoiser.unet.float().train(), denoiser.schedule
    network.requires_grad_(True)
    average = Average(network, 0.998)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    empty = denoiser.states([" "])[0]  # that of the empty prompt is zeros in SDXL
    masks = route_masks(len(empty))

    def loss(step: int, rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,), generator=rng)
        states = denoiser.states([captions[row] for row in chosen.tolist()]).clone()
        alone = torch.rand(BATCH, generator=rng) < ALONE
        blocked = torch.randint(1, 7, (BATCH,), generator=rng)  # a set of one or two routes, by its bits
        for row in alone.nonzero().flatten().tolist():
            for route in range(3):
                if blocked[row] >> route & 1:
                    states[row] = torch.where(masks[route], empty, states[row])
        states[torch.rand(BATCH, generator=rng) < 0.1] = denoiser.states([""])[0]
        clean, noise = latents[chosen], torch.randn(latents[chosen].shape, generator=rng)
        if isinstance(schedule, FlowSchedule):  # arXiv 2403.03206, section 3.1: most often in the middle
            timesteps = schedule.steps * torch.randn(BATCH, generator=rng).sigmoid()
            weights = torch.ones(BATCH)
        else:  # min-SNR-5, Hang et al., 2023
            timesteps = torch.randint(schedule.steps, (BATCH,), generator=rng)
            weights = (5.0 / schedule.picture_ratio()[timesteps].square()).clamp(max=1.0)
        with_noise = schedule.add_noise(clean, noise, timesteps)
        prediction = predict(denoiser, with_noise, timesteps, states)
        error = (prediction - schedule.target(clean, noise, timesteps)).square().mean((1, 2, 3))
        weighted: Tensor = (weights * error).mean()
        return weighted

    parts: dict[str, Any] = {"denoiser": network, "average": average}
    fit(folder / "train", steps, bed.rate, optimizer, parts, loss, seed + 5, after=average.update)
    return average.state_dict()


def read_average(work: Path, kind: str) -> dict[str, Tensor]:
    """What is trained so far."""
    state = torch.load(work / BEDS[kind].name / "train" / "resume.pt", weights_only=True)
    average: dict[str, Tensor] = state["average"]
    return average


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasec.emoji.beds", description=__doc__)
    parser.add_argument("bed", choices=sorted(BEDS))
    parser.add_argument("--data", type=Path, help="the folder of icons.npy, which erasec.emoji.data writes")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; resumable")
    parser.add_argument("--steps", type=int, help="of the whole training")
    parser.add_argument("--weights", type=Path, help="the tensors of the denoiser, to read or, with --work, to write")
    parser.add_argument("--pack", action="store_true", help="write what is trained so far into --weights, and end")
    parser.add_argument("--out", type=Path, help="folder for the model")
    options = parser.parse_args()
    if options.work:
        steps = options.steps or BEDS[options.bed].steps
        state = (
            read_average(options.work, options.bed)
            if options.pack
            else train(options.bed, options.data, options.work, steps)
        )
        if options.weights:
            save_tensors(options.weights, {key: value.half() for key, value in state.items()})
    if options.out:
        state = {key: read_tensor(entry).float() for key, entry in read_header(options.weights)[0].items()}
        write_folder(options.bed, options.out, state)


if __name__ == "__main__":
    main()
