"""The folder of a world's training, through which stages pass pictures and weights to later stages."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erasec.progress import bar
from erasec.worlds import networks
from erasec.worlds.base import World
from erasec.worlds.fit import half_precision

SIZE = 64
WORLD_SEED = 0


def pixels(images: np.ndarray, device: str = "cpu") -> Tensor:
    """Images uint8 (n, 64, 64, 3) -> float (n, 3, 64, 64) in [-1, 1]."""
    return torch.tensor(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class Work:
    """The folder of a run, through which stages pass results to later stages."""

    def __init__(
        self, world: World, root: Path, device: str, seed: int = 0, scale: float = 1.0, half: bool = False
    ) -> None:
        self.world, self.root, self.device = world, root, device
        self.seed, self.scale, self.half = seed, scale, half

    def steps(self, stage: str) -> int:
        return max(2, round(self.world.steps[stage] * self.scale))

    def count(self, images: int) -> int:
        return max(256, round(images * min(1.0, self.scale)))

    def done(self, stage: str) -> bool:
        return (self.root / stage / "done").exists()

    def begun(self, stage: str) -> bool:
        return (self.root / stage / "resume.pt").exists()

    def step(self, stage: str) -> int:
        """The steps that a stage has trained."""
        return int(torch.load(self.root / stage / "resume.pt", weights_only=True)["step"]) if self.begun(stage) else 0

    def load(self, stage: str, part: str) -> dict[str, Tensor]:
        state: dict[str, dict[str, Tensor]] = torch.load(self.root / stage / "resume.pt", weights_only=True)
        return state[part]

    def autocast(self) -> AbstractContextManager[None]:
        return half_precision(self.device, self.half)

    def images(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """The pictures, labels and captions that the models train on."""
        return self.render("render", WORLD_SEED, self.count(self.world.images))

    def render(self, name: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """``count`` pictures, labels and captions of one seed; rendered once and then read from the folder ``name``."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "captions.json").exists():
            images = np.lib.format.open_memmap(
                folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3)
            )
            truth = np.zeros((count, len(self.world.labels)), dtype=np.float32)
            groups, captions = np.zeros(count, dtype=np.int64), []
            with bar(f"render {name}", count) as advance:
                for index in range(count):
                    item = self.world.picture(seed, index)
                    images[index], truth[index], groups[index] = item.image, item.labels, item.group
                    captions.append(item.caption)
                    advance()
            images.flush()
            np.save(folder / "labels.npy", truth)
            np.save(folder / "groups.npy", groups)
            (folder / "captions.json").write_text(json.dumps(captions))
        captions = json.loads((folder / "captions.json").read_text())
        return np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"), captions

    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.root / "tokenizer")

    def token_ids(self, captions: list[str]) -> Tensor:
        batch = self.tokenizer()(
            captions, padding="max_length", max_length=networks.POSITIONS, truncation=True, return_tensors="pt"
        )
        ids: Tensor = batch.input_ids
        return ids

    def text_encoder(self) -> Any:
        tokenizer = self.tokenizer()
        encoder = networks.text_encoder(
            self.world.sizes, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
        )
        return encoder.to(self.device)

    def vae(self) -> Any:
        vae = networks.vae(self.world.sizes).to(self.device)
        vae.load_state_dict(self.load("vae", "vae"))
        return vae.eval()
