"""Pictures of glyphs and a small CLIP that knows them by heart."""

from __future__ import annotations

from pathlib import Path

import clip_folder
import pytest


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder that embeds ``clip_folder.PICTURES`` where the texts about them are."""
    model = clip_folder.small_clip()
    clip_folder.memorise(model)
    return clip_folder.write(model, tmp_path_factory.mktemp("clip") / "small-clip")
