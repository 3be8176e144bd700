"""Small CLIPModel folders in transformers' layout. The text half is that of glyphs' contrastive pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from erasec.glyphs.judge import GlyphJudge
from erasec.model.loading import load, world_weights

if TYPE_CHECKING:
    from erasec.base import Images

SIDE = 64
SCALE = 14.0  # the temperature of glyphs' pair, about


def small_clip() -> Any:
    """A CLIPModel whose text half is that of glyphs' pair, with a vision tower that is not trained."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    from erasec.glyphs.recipe import SIZES
    from erasec.worlds.networks import vision_config

    encoder = CLIPTextModel.from_pretrained(world_weights("glyphs") / "glyphs" / "text_encoder", dtype=torch.float32)
    pair = GlyphJudge()._pair
    torch.manual_seed(0)
    # Half the layers, and a quarter of the patches, of the emoji world's tower: it is trained in a test.
    vision = {**vision_config(SIZES), "num_hidden_layers": 2, "patch_size": 16}
    config = CLIPConfig(text_config=encoder.config.to_dict(), vision_config=vision, projection_dim=SIZES.text_width)
    model = CLIPModel(config)
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    model.text_model.load_state_dict(state)
    model.text_projection.weight.data = pair.text.weight.data.clone()
    model.logit_scale.data = pair.log_scale.data.clone()
    return model.eval()


def pictures() -> tuple[Images, tuple[str, ...]]:
    """One render of each shape, (10, 64, 64, 3), and the shape that each shows."""
    from erasec.glyphs import world

    shapes: dict[str, Images] = {}
    for index in range(600):
        sample = world.sample(3, index)
        if len(sample.glyphs) == 1:
            shapes.setdefault(sample.glyphs[0].shape, sample.image)
    return np.stack([shapes[shape] for shape in world.SHAPES]), tuple(world.SHAPES)


def shape_texts() -> torch.Tensor:
    """The embeddings of "a star" and so on by glyphs' pair, (10, width)."""
    from erasec.glyphs import world

    tokens = load("glyphs").encode([f"a {shape}" for shape in world.SHAPES])
    with torch.no_grad():
        texts: torch.Tensor = GlyphJudge()._pair.texts(tokens.states[torch.arange(10), tokens.last + 1].float())
    return texts


def memorise(model: Any) -> None:
    """Solve the projection of the vision tower so that each of ``pictures`` is embedded where its text is.

    There are more features than pictures, so that the equations have an exact solution. Other pictures mean nothing.
    """
    images, _ = pictures()
    targets = shape_texts()
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        features = model.vision_model(pixel_values=pixels).pooler_output
        model.visual_projection.weight.copy_(torch.linalg.lstsq(features.double(), targets.double()).solution.T)


def write(model: Any, folder: Path) -> Path:
    """Write the model with the tokenizer of glyphs and an image processor for pictures of 64 pixels."""
    from transformers import CLIPImageProcessorPil

    model.save_pretrained(folder)
    for path in (world_weights("glyphs") / "glyphs" / "tokenizer").iterdir():
        shutil.copy(path, folder)
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
    return folder


def train(model: Any, steps: int, batch: int = 64, lr: float = 1e-3, seed: int = 90) -> None:
    """Train the vision tower of ``model`` on renders with one shape: as CLIP is trained, towards the text about the
    shape and away from those about the others. The texts stay as they are."""
    from erasec.glyphs import world

    samples = [sample for index in range(4000) if len((sample := world.sample(seed, index)).glyphs) == 1]
    pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).float() / 127.5 - 1
    shapes = torch.tensor([tuple(world.SHAPES).index(sample.glyphs[0].shape) for sample in samples])
    texts = shape_texts()
    tower = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimiser = torch.optim.AdamW(tower, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    rng = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(samples), (batch,), generator=rng)
        pooled = model.vision_model(pixel_values=pixels[rows]).pooler_output
        embeddings = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
        loss = torch.nn.functional.cross_entropy(SCALE * embeddings @ texts.T, shapes[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
