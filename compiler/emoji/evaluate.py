"""Measures the models and judges of the emoji world and writes quality.json: ``python -m erasec.emoji.evaluate``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.attention.pipeline import Sampling, pipeline
from erasec.checkpoint.safetensors import atomic_write
from erasec.emoji import world
from erasec.emoji.judge import EmojiJudge, prompt
from erasec.emoji.words import ARTISTS, FILLERS, LABELS, LEFT_OUT, OBJECTS, SCENES, members
from erasec.model.loading import load, world_folder, world_weights
from erasec.progress import bar
from erasec.worlds import evaluate
from erasec.worlds.assemble import SCHEDULER

if TYPE_CHECKING:
    from erasec.base import Images

HELD_OUT_SEED = 103
SAMPLING = Sampling(steps=20, guidance=4.0)
TWIN = "emoji-never-owl-noto"
CONTEXTS = 60  # pictures of each context
PARTS = ("by_name", "scenes", "twin", "pair_shows_both", "contexts", "text_states")


def judges(weights: Path, icons: NDArray[np.uint8], count: int) -> dict[str, Any]:
    """How well each judge reads held-out renders: the object of pictures with one, the artist, and all labels."""
    samples = []
    with bar("held-out renders", count) as advance:
        for index in range(count):
            samples.append(world.sample(icons, HELD_OUT_SEED, index))
            advance()
    images, truth = np.stack([item.image for item in samples]), np.stack([item.labels for item in samples]) > 0.5
    single = np.array([len(item.objects) == 1 for item in samples])
    figures: dict[str, Any] = {"renders": count}
    for which in "ab":
        logits = EmojiJudge(which, weights).logits(images)
        objects = slice(0, len(OBJECTS))
        right = logits[:, objects].argmax(1) == truth[:, objects].argmax(1)
        artists = slice(len(OBJECTS), len(OBJECTS) + len(ARTISTS))
        drawn = truth[:, artists].any(1)
        figures[f"judge_{which}"] = {
            "object_top1": float(right[single].mean()),
            "artist_top1": float((logits[:, artists].argmax(1) == truth[:, artists].argmax(1))[drawn].mean()),
            "objects_exact": float(((logits[:, objects] > 0) == truth[:, objects]).all(1).mean()),
            "false_objects_on_nothing": float((logits[~drawn, objects] > 0).any(1).mean()),
        }
    return figures


class Bench:
    """A model and judge B: what its pictures of prompts show."""

    def __init__(self, weights: Path, name: str) -> None:
        self.folder, self.judge = world_folder(weights, "emoji", name), EmojiJudge("b", weights)

    def pictures(self, prompts: list[str], seed: int) -> Images:
        return evaluate.pictures(self.folder, prompts, seed, SAMPLING)

    def objects(self, images: Images) -> list[str]:
        """The object with the largest logit in each picture."""
        best = self.judge.logits(images)[:, : len(OBJECTS)].argmax(1)
        return [LABELS[int(column)] for column in best]

    def artists(self, images: Images) -> list[str]:
        """The artist with the largest logit in each picture."""
        best = self.judge.logits(images)[:, len(OBJECTS) : len(OBJECTS) + len(ARTISTS)].argmax(1)
        return [list(ARTISTS)[int(column)] for column in best]

    def shows(self, images: Images, label: str) -> float:
        """The share of pictures in which the judge sees the label."""
        return float(self.judge.sees(images, [label] * len(images)).mean())


def by_name(base: Bench, seeds: int, seed: int) -> dict[str, Any]:
    """Top-1 of all objects for plain prompts of each, and whether the artist in half of them is right."""
    artists = list(ARTISTS)
    wanted = [
        (name, index, artists[(index // 2) % 4] if index % 2 else "") for name in OBJECTS for index in range(seeds)
    ]
    images = base.pictures([prompt(*item) for item in wanted], seed)
    right = np.array([seen == item[0] for seen, item in zip(base.objects(images), wanted, strict=True)])
    rates = dict(zip(OBJECTS, right.reshape(len(OBJECTS), seeds).mean(1).tolist(), strict=True))
    styled = [(seen, item[2]) for seen, item in zip(base.artists(images), wanted, strict=True) if item[2]]
    return {
        "seeds_per_object": seeds,
        "object_top1_mean": float(right.mean()),
        "object_top1_worst": min(rates.items(), key=lambda item: item[1]),
        "object_top1": rates,
        "artist_right": float(np.mean([seen == artist for seen, artist in styled])),
    }


def pairs(base: Bench, count: int, seed: int) -> float:
    """The share of captions with two objects whose picture shows both."""
    rng, names = np.random.default_rng(seed), list(OBJECTS)
    chosen = [tuple(names[int(i)] for i in rng.choice(len(names), 2, replace=False)) for _ in range(count)]
    relations = (*world.BESIDE, *world.ABOVE)
    prompts = [relations[i % len(relations)].format(*map(world.article, pair)) for i, pair in enumerate(chosen)]
    images = base.pictures(prompts, seed)
    both = base.judge.sees(images, [a for a, _ in chosen]) & base.judge.sees(images, [b for _, b in chosen])
    return float(both.mean())


def scenes(base: Bench, count: int, seed: int) -> dict[str, Any]:
    """For each scene: how often a picture shows one of its objects, and the largest share of a single one."""
    prompts = [SCENES[scene][i % len(SCENES[scene])] for scene in SCENES for i in range(count)]
    seen = base.objects(base.pictures(prompts, seed))
    hits, largest = [], []
    for row, scene in enumerate(SCENES):
        own = [name for name in seen[row * count : (row + 1) * count] if name in members(scene)]
        hits.append(len(own) / count)
        largest.append(max(Counter(own).values(), default=0) / count)
    return {"pictures_per_scene": count, "shows_a_member": float(np.mean(hits)), "largest_share": max(largest)}


def contexts(base: Bench, seed: int) -> dict[str, float]:
    """The share of pictures that show the object amid about 60 tokens, beside another object, and misspelt."""
    rng, names = np.random.default_rng(seed), list(OBJECTS)
    chosen = [names[int(i)] for i in rng.integers(len(names), size=CONTEXTS)]
    others = [names[int(i)] for i in rng.integers(len(names), size=CONTEXTS)]
    fillers = [", ".join(FILLERS[int(i)] for i in rng.choice(len(FILLERS), 11, replace=False)) for _ in chosen]
    written = {
        "amid 60 tokens": [f"{world.article(name)}, {text}" for name, text in zip(chosen, fillers, strict=True)],
        "beside": [f"{world.article(a)} beside {world.article(b)}" for a, b in zip(chosen, others, strict=True)],
        "misspelt": [f"a drawing of {world.article(world.misspelt(rng, name))}" for name in chosen],
    }
    return {
        name: float(base.judge.sees(base.pictures(prompts, seed), chosen).mean()) for name, prompts in written.items()
    }


def text_states(weights: Path) -> dict[str, float]:
    """Geometry of the last token's states: how near a scene is to its objects, and how many dimensions matter."""
    model = load(str(weights / "emoji"))
    names = list(OBJECTS)
    texts = [f"a drawing of {world.article(name)}" for name in names]
    phrases = [(scene, f"something {SCENES[scene][0]}") for scene in SCENES]
    tokens = model.encode([*texts, *(text for _, text in phrases)])
    states = tokens.states[np.arange(len(tokens.last)), tokens.last + 1].double().numpy()
    centred = states - states[: len(names)].mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = [
        float(unit[len(names) + row] @ unit[names.index(name)])
        for row, (scene, _) in enumerate(phrases)
        for name in members(scene)
    ]
    spread = np.linalg.svd(centred[: len(names)], compute_uv=False) ** 2
    dimensions = int(np.searchsorted(np.cumsum(spread) / spread.sum(), 0.9)) + 1
    return {
        "scene_to_object_cosine_mean": float(np.mean(cosines)),
        "scene_to_object_cosine_max": max(cosines),
        "dimensions_of_90_percent_variance": dimensions,
    }


def invert(folder: Path, images: Images, steps: int = 50) -> Images:
    """DDIM inversion with the empty prompt and back, without guidance (Mokady et al., 2023), (n, 64, 64, 3)."""
    import torch
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    pipe = pipeline(folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad():
        states = pipe.encode_prompt("", "cpu", 1, False)[0].expand(len(images), -1, -1)
        latents = pipe.vae.encode(batch).latent_dist.mean * pipe.vae.config.scaling_factor
        for kind in (DDIMInverseScheduler, DDIMScheduler):
            options = {} if kind is DDIMInverseScheduler else {"clip_sample": False, "set_alpha_to_one": False}
            scheduler = kind.from_config(pipe.scheduler.config, **options)
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                prediction = pipe.unet(latents, t, states).sample
                latents = scheduler.step(prediction, t, latents).prev_sample
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    pictures: Images = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return pictures


def twin(base: Bench, never: Bench, count: int, seed: int) -> dict[str, float]:
    """How often the twin shows what it has never seen: by name, and after DDIM inversion of the base's pictures."""
    name, artist = LEFT_OUT
    item = OBJECTS[name]
    phrases = [prompt(item.names[i % len(item.names)], i) for i in range(count)]
    scene = [SCENES[item.scenes[i % len(item.scenes)]][0] for i in range(count)]
    others = [other for other in OBJECTS if other != name]
    styled = [prompt(others[i * 7 % len(others)], i, artist) for i in range(count)]
    by_artist = never.pictures(styled, seed)
    seen = base.pictures(phrases, seed)
    seen = seen[base.judge.sees(seen, [name] * count)]
    return {
        "pictures": count,
        "object_by_name_or_synonym": never.shows(never.pictures(phrases, seed), name),
        "object_by_scene": never.shows(never.pictures(scene, seed), name),
        # Of four artists one is always the most likely; ``sees`` also says no.
        "artist_most_likely": float(np.mean([seen == artist for seen in never.artists(by_artist)])),
        "artist_by_name": never.shows(by_artist, artist),
        "other_objects_right": float(
            np.mean(
                [
                    seen == wanted
                    for seen, wanted in zip(
                        never.objects(never.pictures([prompt(other, 1) for other in others], seed)), others, strict=True
                    )
                ]
            )
        ),
        "object_after_ddim_inversion": never.shows(invert(never.folder, seen), name) if len(seen) else float("nan"),
    }


def contact_sheet(base: Bench, path: Path, seed: int = 7) -> None:
    """Write a PNG of 16 rows: eight objects by name, two in each style by turns, two pairs and two scenes a row."""
    names, artists = list(OBJECTS), list(ARTISTS)
    prompts = []
    for row in range(16):
        own = [names[(row * 9 + column) % len(names)] for column in range(9)]
        prompts += [prompt(name, column, artists[column % 4] if column % 2 else "") for column, name in enumerate(own)]
        prompts.append(f"{world.article(own[0])} {'above' if row % 2 else 'beside'} {world.article(own[5])}")
        scene = list(SCENES)[row * 2 % len(SCENES)]
        prompts += [SCENES[scene][0], SCENES[scene][0]]
    images = base.pictures(prompts, seed)
    evaluate.write_sheet(path, images.reshape(16, 12, *images.shape[1:]))


def part(name: str, weights: Path, seeds: int, seed: int) -> Any:
    """One part of the figures, by its key; ``seeds`` are those of each object by name."""
    if name == "text_states":
        return text_states(weights)
    base = Bench(weights, "emoji")
    if name == "twin":
        return twin(base, Bench(weights, TWIN), 100, seed + 4)
    parts: dict[str, Callable[[], Any]] = {
        "by_name": lambda: by_name(base, seeds, seed),
        "pair_shows_both": lambda: pairs(base, 200, seed + 1),
        "scenes": lambda: scenes(base, 20, seed + 2),
        "contexts": lambda: contexts(base, seed + 3),
    }
    return parts[name]()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasec.emoji.evaluate", description=__doc__)
    parser.add_argument("--weights", type=Path, default=world_weights("emoji").resolve(), help="folder of the weights")
    parser.add_argument("--data", type=Path, help="folder of icons.npy, to measure the judges on renders")
    parser.add_argument("--seeds", type=int, default=10, help="seeds per object")
    parser.add_argument("--renders", type=int, default=4000, help="held-out renders for the judges")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--jobs", type=int, default=1, help="processes; best with OMP_NUM_THREADS=1")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of samples to this PNG")
    parser.add_argument("--only-sheet", action="store_true", help="write nothing but the contact sheet")
    options = parser.parse_args()
    if options.sheet:
        contact_sheet(Bench(options.weights, "emoji"), options.sheet)
    if options.only_sheet:
        return
    seed = options.seed
    # The longest parts first; each in a process of its own, whose results do not depend on the others.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = {name: pool.submit(part, name, options.weights, options.seeds, seed) for name in PARTS}
        measured = {name: future.result() for name, future in running.items()}
    figures: dict[str, Any] = {
        **measured.pop("by_name"),
        **measured,
        "how": f"judge B, {SCHEDULER} {SAMPLING.steps} steps, guidance {SAMPLING.guidance:g}, float32, seed {seed}",
        "weights": evaluate.digests(options.weights),
    }
    if options.data:
        icons = np.load(options.data / "icons.npy", mmap_mode="r")
        figures["judges"] = judges(options.weights, icons, options.renders)
    with atomic_write(options.weights / "quality.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
