"""The judge clip on the CLIPModel folder of the emoji world, which is trained: it decides much like judge B."""

from __future__ import annotations

import numpy as np
import pytest

from erasec.attention.pipeline import Sampling
from erasec.emoji.judge import EmojiJudge, prompt
from erasec.judges.clip import Clip
from erasec.model.loading import world_folder, world_weights
from erasec.recipe.concept import find
from erasec.worlds.evaluate import pictures

SHOWN = ("owl", "pizza", "umbrella")
EACH = 8


@pytest.mark.slow
def test_it_sees_nearly_what_judge_b_sees() -> None:
    concepts = [find(name, "emoji").model_copy(update={"judge": (("clip", ()),)}) for name in SHOWN]
    folder = world_weights("emoji").resolve() / "judges" / "clip"
    clip = Clip.for_concepts(concepts, {"folder": str(folder)}, True)
    assert clip is not None
    base = world_folder(world_weights("emoji").resolve(), "emoji", "emoji")
    prompts = [prompt(name, number) for name in SHOWN for number in range(EACH)]
    images = pictures(base, prompts, 5, Sampling(steps=20, guidance=4.0))
    by_clip, by_b = (
        np.array([judge.sees(images, [name] * len(images)) for name in SHOWN]) for judge in (clip, EmojiJudge("b"))
    )
    shown = np.repeat(np.eye(len(SHOWN), dtype=bool), EACH, 1)
    assert by_b[shown].mean() > 0.7
    assert abs(by_clip[shown].mean() - by_b[shown].mean()) <= 0.15
    assert (by_clip == by_b).mean() > 0.9
    # The control: of pictures of another object it sees nothing.
    assert by_clip[~shown].mean() < 0.05
