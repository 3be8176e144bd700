"""The judges' training pictures: soft copies of renders, reconstructed by the VAE or redrawn by the base UNet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erasec.model.loading import world_weights
from erasec.worlds import networks, published, train_judge
from erasec.worlds.base import open_world
from erasec.worlds.work import Work, pixels


def test_a_unet_that_knows_the_noise_redraws_the_latents() -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    calls: list[int] = []

    def perfect(noisy: Tensor, timestep: Tensor, states: Tensor) -> Any:
        calls.append(int(timestep))
        return SimpleNamespace(sample=noise)

    def blind(noisy: Tensor, timestep: Tensor, states: Tensor) -> Any:
        return SimpleNamespace(sample=torch.zeros_like(noise))

    redraw: Any = train_judge.redraw
    redrawn = redraw(perfect, latents, latents, 400, torch.Generator().manual_seed(1))
    left = networks.alphas_cumprod()[0]
    torch.testing.assert_close(redrawn, left.sqrt() * latents + (1 - left).sqrt() * noise)
    assert calls == [400, 300, 200, 100]
    wrong = redraw(blind, latents, latents, 400, torch.Generator().manual_seed(1))
    assert (wrong - latents).abs().mean() > 10 * (redrawn - latents).abs().mean()


def test_a_share_of_the_soft_copies_is_redrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_world("glyphs", None)
    work = Work(plain, tmp_path, "cpu")
    published.take(work, world_weights("glyphs").resolve())
    folder = world_weights("glyphs") / "glyphs"
    factor = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "factor.json").write_text(json.dumps({"scaling_factor": factor}))
    images = np.stack([plain.picture(5, index).image for index in range(6)])
    reconstructed = train_judge.soft_copies(work, "judge-a", images)
    with torch.no_grad():
        expected = work.vae()(pixels(images)).sample.clamp(-1, 1)
    assert np.abs(reconstructed.transpose(0, 3, 1, 2) / 127.5 - 1 - expected.numpy()).max() < 0.01

    work.world = replace(plain, redrawn=0.5)
    copies = train_judge.soft_copies(work, "judge-a", images)
    changes = np.abs(copies.astype(float) - reconstructed).mean((1, 2, 3))
    assert (changes[:3] > 0.5).all() and (changes[3:] == 0).all()
    # Redrawn by a trained UNet, a picture is still near to the render; by an untrained one it is not.
    assert np.abs(copies.astype(float) - images).mean() < 20
    monkeypatch.setattr(train_judge, "STRENGTHS", (399, 400))
    (tmp_path / "unet" / "resume.pt").unlink()
    torch.manual_seed(0)
    torch.save({"step": 0, "average": networks.unet(plain.sizes).state_dict()}, tmp_path / "unet" / "resume.pt")
    untrained = train_judge.soft_copies(work, "judge-a", images)
    assert np.abs(untrained[:3].astype(float) - images[:3]).mean() > 20
