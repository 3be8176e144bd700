"""Which pictures are painted, and painting them: budgets, turns, the cache, and what this machine cannot run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from erasec.attention import pipeline
from erasec.attention.sampling import Sampling
from erasec.base import Question
from erasec.glyphs.judge import GlyphJudge
from erasec.judging import painting
from erasec.judging.painting import Painting, affordable, paint_pairs, plan_painting
from erasec.model import loading
from erasec.recipe import concept
from erasec.recipe.recipe import Limits

BASE, BUILT, SAMPLING = Path("base"), Path("built"), Sampling(2, 3.0)
GROUPS = ("name", "name", "synonym", "synonym", "keep", "keep")
QUESTIONS = tuple(Question(group, f"{group} {number}", number, "") for number, group in enumerate(GROUPS))


class Painter:
    """Stands in for the pipeline: one picture at a time, each of ``seconds``, of a level that its seed decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.clock = 0.0, 100.0
        self.painted: list[tuple[str, int, str]] = []
        monkeypatch.setattr(pipeline, "paint", self.paint)
        monkeypatch.setattr(painting, "time", SimpleNamespace(monotonic=lambda: self.clock))

    def paint(
        self, folder: Path, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, title: str, variant: str
    ) -> Iterator[Any]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            assert prompt.endswith(f" {seed}")
            self.clock += self.seconds
            self.painted.append((folder.name, seed, variant))
            yield np.full((1, 4, 4, 3), seed + 100 * (folder == BUILT), np.uint8)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Painter:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    return Painter(monkeypatch)


def levels(pictures: Any) -> list[int]:
    return [int(picture[0, 0, 0]) for picture in pictures]


def test_without_a_budget_everything_is_painted_in_its_order(painter: Painter) -> None:
    painter.seconds = 1e6
    rows, before, after = paint_pairs(BASE, BUILT, QUESTIONS, SAMPLING, variant="fp16")
    assert rows == [0, 1, 2, 3, 4, 5]
    assert levels(before) == [0, 1, 2, 3, 4, 5] and levels(after) == [100, 101, 102, 103, 104, 105]
    assert painter.painted == [("base", n, "fp16") for n in range(6)] + [("built", n, "") for n in range(6)]


@pytest.mark.parametrize(("seconds", "rows"), [(1, [0, 1, 2, 3, 4, 5]), (10, [0, 2, 4]), (1000, [0])])
def test_a_budget_gives_every_group_its_turn_and_one_pair_in_any_case(
    painter: Painter, seconds: float, rows: list[int]
) -> None:
    """60 seconds: all 12 pictures fit, or 3 of 10 seconds in each half, or one in each half that is over at once."""
    painter.seconds = seconds
    painted, before, after = paint_pairs(BASE, BUILT, QUESTIONS, SAMPLING, minutes=59 / 60 if seconds == 10 else 1)
    assert painted == rows
    assert levels(before) == rows and levels(after) == [100 + row for row in rows]


def test_the_second_build_paints_only_what_is_new(painter: Painter, tmp_path: Path) -> None:
    paint_pairs(BASE, BUILT, QUESTIONS[:4], SAMPLING, cache="model")
    painter.painted.clear()
    rows, before, after = paint_pairs(BASE, BUILT, QUESTIONS, SAMPLING, cache="model")
    assert [seed for folder, seed, _ in painter.painted if folder == "base"] == [4, 5]
    assert [seed for folder, seed, _ in painter.painted if folder == "built"] == [0, 1, 2, 3, 4, 5]
    assert levels(before) == rows == [0, 1, 2, 3, 4, 5] and levels(after)[0] == 100
    painter.painted.clear()
    files = sorted((tmp_path / "cache" / "pictures").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\0")  # a damaged picture is painted again
    _, before, _ = paint_pairs(BASE, BUILT, QUESTIONS, SAMPLING, cache="model")
    assert len([folder for folder, _, _ in painter.painted if folder == "base"]) == 1
    assert levels(before) == [0, 1, 2, 3, 4, 5]
    painter.painted.clear()
    paint_pairs(BASE, BUILT, QUESTIONS, SAMPLING, cache="another model")
    assert len(painter.painted) == 12


def model(parameters: int = 1000, name: str = "StableDiffusionPipeline") -> Any:
    family = SimpleNamespace(components=("unet", "vae"), denoiser="unet")
    source = SimpleNamespace(index={"_class_name": name})
    return SimpleNamespace(family=family, source=source, count=lambda _: parameters, name="model")


def test_a_judge_looks_in_another_thread_while_the_next_pictures_are_painted(painter: Painter) -> None:
    looked: list[tuple[int, bool]] = []

    def watch(batch: Any) -> None:
        looked.extend((level, threading.current_thread() is threading.main_thread()) for level in levels(batch))

    paint_pairs(BASE, BUILT, QUESTIONS[:2], SAMPLING, cache="model")
    paint_pairs(BASE, BUILT, QUESTIONS[:3], SAMPLING, cache="model", watch=watch)
    assert looked == [(level, False) for level in (0, 1, 2, 100, 101, 102)]  # cached ones too, each once

    def broken(batch: Any) -> None:
        raise ValueError("the judge fails")

    with pytest.raises(ValueError, match="the judge fails"):
        paint_pairs(BASE, BUILT, QUESTIONS[:2], SAMPLING, watch=broken)


CHURCH, STAR = concept.find("church"), concept.find("star", "glyphs")


@pytest.mark.parametrize(
    ("parameters", "device", "pictures", "steps", "side"),
    [(1000, "cpu", 2, 4, 512), (300_000_000, "cpu", 1, 4, 512), (300_000_000, "cuda", 16, 15, 0)],
)
def test_a_cpu_gets_few_pictures_in_few_steps_and_a_gpu_as_many_as_a_judge(
    monkeypatch: pytest.MonkeyPatch, parameters: int, device: str, pictures: int, steps: int, side: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(painting, "available_memory", lambda: None)
    planned = plan_painting(model(parameters), None, [CHURCH], Limits(), device)
    dtype = "bfloat16" if device == "cuda" else "float32"
    assert planned == Painting(False, 16, pictures, Sampling(steps, 4.0, device, dtype, side), 10.0)
    for words in (f"{pictures} for each group", f"{steps} steps", f"{dtype} on {device}", "at most 10 minutes"):
        assert words in planned.text


def test_a_gpu_without_bfloat16_uses_float16_for_large_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(painting, "available_memory", lambda: None)
    types = [plan_painting(model(n), None, [CHURCH], Limits(), "cuda:1").sampling.dtype for n in (1000, 300_000_000)]
    assert types == ["float32", "float16"]


def test_the_recipe_decides_before_the_device() -> None:
    limits = Limits(pictures=3, picture_steps=2, picture_size=256, picture_minutes=1.5)
    planned = plan_painting(model(), None, [CHURCH], limits, "cpu")
    assert planned == Painting(False, 16, 3, Sampling(2, 4.0, "cpu", "float32", 256), 1.5)
    none = plan_painting(model(), None, [CHURCH], Limits(pictures=0), "cpu")
    assert not none and none.text.startswith("none")


@pytest.mark.parametrize(
    ("parameters", "device", "given", "expected"),
    [
        (300_000_000, "cpu", {}, (2, 10)),
        (300_000_000, "cpu", {"images": 8}, (8, 10)),
        (300_000_000, "cuda", {}, (16, 15)),
        (1000, "cpu", {}, (16, 15)),
    ],
)
def test_a_cpu_judges_few_pictures_of_a_large_model_unless_the_recipe_says_how_many(
    parameters: int, device: str, given: dict[str, int], expected: tuple[int, int]
) -> None:
    limits = affordable(Limits(**given), model(parameters), device)
    assert (limits.images, limits.steps) == expected
    again = affordable(limits, model(parameters), device)  # as in the resolved recipe
    assert again == limits


def test_a_reference_world_is_judged_in_fewer_steps_of_its_own_scheduler() -> None:
    glyphs = loading.load("glyphs")
    assert affordable(Limits(), glyphs, "cpu", world=True).steps == painting.WORLD_STEPS
    assert affordable(Limits(steps=20), glyphs, "cpu", world=True).steps == 20
    assert affordable(Limits(), glyphs, "cpu").steps == 15
    assert affordable(Limits(), model(1000), "cpu", world=True).steps == 15  # its scheduler is another one


@pytest.mark.parametrize(("concepts", "images"), [(1, 16), (8, 16), (10, 13), (50, 3), (1000, 2)])
def test_many_concepts_share_the_pictures(concepts: int, images: int) -> None:
    limits = affordable(Limits(), model(1000), "cpu", concepts)
    assert limits.images == images
    assert affordable(limits, model(1000), "cpu", concepts) == limits  # as in the resolved recipe
    assert affordable(Limits(images=16), model(1000), "cpu", concepts).images == 16


def test_a_judge_gets_its_own_number_of_pictures_in_the_size_of_the_model_and_all_the_time() -> None:
    glyphs = loading.load("glyphs")
    planned = plan_painting(glyphs, GlyphJudge(), [STAR], Limits(images=5), "cpu")
    assert planned.judged and (planned.images, planned.minutes, planned.sampling) == (5, None, Sampling(15, 4.0))


@pytest.mark.parametrize(
    ("name", "memory", "words"),
    [
        ("StableDiffusionInpaintPipeline", None, "needs an image"),
        ("AudioPipeline", None, "erasec runs"),
        ("StableDiffusionPipeline", 5000, "9.6 kB of memory, 5 kB are free"),
    ],
)
def test_what_this_machine_cannot_run_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, memory: int | None, words: str
) -> None:
    monkeypatch.setattr(painting, "available_memory", lambda: memory)
    planned = plan_painting(model(name=name), None, [CHURCH], Limits(), "cpu")
    assert not planned and words in planned.text
    monkeypatch.setattr(painting, "available_memory", lambda: 10_000)
    assert plan_painting(model(), None, [CHURCH], Limits(), "cpu")  # negative control


def test_the_memory_that_is_free_is_a_number_of_bytes_below_that_of_the_machine() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = painting.available_memory()
    assert free is not None and 0 <= free < 1024 * int(lines["MemTotal"].split()[0])
