"""The shipped models of the emoji world: their layout, and that they do what the committed figures say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from erasec.attention.pipeline import generate
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header
from erasec.emoji.evaluate import SAMPLING
from erasec.emoji.judge import EmojiJudge, prompt
from erasec.emoji.words import ARTISTS, LEFT_OUT, OBJECTS
from erasec.model.loading import bundled_folder, load, twin_of, world_weights
from erasec.worlds import evaluate

WEIGHTS = world_weights("emoji")


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((WEIGHTS / "quality.json").read_text())
    return content


def test_all_weights_are_half_precision_and_small() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 70e6
    for path in files:
        if path.suffix == ".safetensors":
            assert {entry.dtype for entry in read_header(path)[0].values()} <= {"F16", "I64"}, path


def test_the_twin_has_a_unet_of_its_own_and_shares_the_rest() -> None:
    ours, theirs = Folder(bundled_folder("emoji")), Folder(bundled_folder("emoji-never-owl-noto"))
    assert ours.files() == theirs.files()
    differ = [n.as_posix() for n in ours.files() if (ours.root / n).read_bytes() != (theirs.root / n).read_bytes()]
    assert differ == ["unet/diffusion_pytorch_model.safetensors"]


def test_the_twin_is_that_of_what_it_never_saw() -> None:
    for label in LEFT_OUT:
        assert twin_of("emoji", [label]) == "emoji-never-owl-noto"
    assert twin_of("emoji", ["eagle"]) == twin_of("emoji", ["owl", "eagle"]) == ""
    assert load("emoji").family.name == "sd1"


def test_the_figures_are_of_these_weights(figures: dict[str, Any]) -> None:
    assert figures["weights"] == evaluate.digests(WEIGHTS)


def test_the_judge_is_that_of_the_model_and_of_no_other() -> None:
    judge, other = EmojiJudge.for_model(load("emoji")), EmojiJudge.for_model(load("emoji"), tuning=True)
    assert judge is not None and other is not None and (judge.which, other.which) == ("b", "a")
    assert judge.digest != other.digest
    assert EmojiJudge.for_model(load("glyphs")) is None


NAMES = list(OBJECTS)[::6]
TEXTS = [prompt(name, 1) for name in NAMES]


@pytest.fixture(scope="module")
def images() -> Any:
    """Pictures by other seeds than those of the figures, so that a swapped or broken file is seen."""
    return generate(bundled_folder("emoji"), TEXTS, list(range(len(NAMES))), SAMPLING, "")


def test_fresh_pictures_agree_with_the_figures(figures: dict[str, Any], images: Any) -> None:
    judge = EmojiJudge()
    expected = np.mean([figures["object_top1"][name] for name in NAMES])
    columns = judge.logits(images)[:, : len(OBJECTS)].argmax(1)
    right = np.mean([list(OBJECTS)[column] == name for column, name in zip(columns, NAMES, strict=True)])
    assert abs(right - expected) < 0.25
    assert judge.sees(images, NAMES[1:] + NAMES[:1]).mean() < 0.1


def test_the_contrastive_pair_prefers_the_right_caption_and_embeds_pictures(images: Any) -> None:
    judge = EmojiJudge()
    right, wrong = judge.agreement(images, TEXTS), judge.agreement(images, TEXTS[1:] + TEXTS[:1])
    assert right.mean() > wrong.mean() + 0.2
    embeddings = judge.embed(images)
    assert embeddings.shape[0] == len(images)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert set(ARTISTS).isdisjoint(NAMES)
