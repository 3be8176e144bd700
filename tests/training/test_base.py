"""What learned passes share: the bank of what a teacher said, and options in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.glyphs.judging import GlyphJudge
from erasec.model import view as model
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.recipe import concept
from erasec.training import base as learned
from erasec.training.denoiser import Denoiser, Student


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Model:
    return model.load(str(random_folder))


def test_a_bank_holds_what_the_teacher_says_of_every_pair(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    found = learned.bank(denoiser, ["a star", "a ring", ""], seed=2, steps=4, guidance=3.0, part=slice(0, 2))
    assert found.latents.shape[0] == found.said.shape[0] == found.times.shape[0] == 6
    assert found.texts(torch.tensor([0, 2, 5])) == ["a star", "a ring", ""]
    row = 3
    with torch.no_grad():
        said = denoiser.predict(found.latents[[row]], found.times[[row]], denoiser.states(["a ring"]))
        free = denoiser.predict(found.latents[[row]], found.times[[row]], denoiser.states([""]))
    assert torch.allclose(found.said[[row]], said, atol=1e-5)
    assert torch.allclose(found.free[[row]], free, atol=1e-5)
    assert not torch.allclose(said, free, atol=1e-5)
    again = learned.bank(Denoiser(base, Context()), ["a star", "a ring", ""], 2, 4, 3.0, slice(0, 2))
    assert torch.equal(again.said, found.said)


def test_prompts_all_come_before_any_comes_again() -> None:
    found = learned.spread(["a", "b", "c"], 7, seed=1)
    assert sorted(found[:3]) == sorted(found[3:6]) == ["a", "b", "c"]
    assert found != learned.spread(["a", "b", "c"], 7, seed=4)


def test_the_keeping_loss_is_nothing_until_something_moves(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    found = learned.bank(denoiser, ["a ring", ""], 0, 3, 3.0)
    loss = learned.kept(denoiser, found, 4)
    student = Student(learned.modules(denoiser), base.select("cross", ("v",)))
    assert float(loss(torch.Generator().manual_seed(0)).detach()) < 1e-9
    with torch.no_grad():
        for value in student.trained.values():
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        assert float(loss(torch.Generator().manual_seed(0))) > 1e-6


def test_training_looks_at_no_noise_that_a_judge_looks_at() -> None:
    builds = range(4)
    asked = {each.seed for seed in builds for each in GlyphJudge().panel(concept.find("star"), 1000, seed)}
    assert len(asked) > 4 * 1000
    used = [learned.seeds(seed, 1000) for seed in builds]
    assert all(len(set(seeds)) == 1000 for seeds in used)
    assert not asked & {seed for seeds in used for seed in seeds}
    assert not set(used[0]) & set(used[1])
    assert asked & set(range(1000))  # the control: what a build's own seed begins with


@pytest.mark.parametrize(
    ("options", "said"), [({"steps": 0}, "steps is 0"), ({"lr": 0.0}, "lr is 0"), ({"rank": -1}, "rank is -1")]
)
def test_options_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ErasecError, match=said):
        Esd(**options)  # type: ignore[arg-type]
