"""A training continues on another machine from the weights that were written, and trains only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from erasec.errors import ErasecError
from erasec.worlds import published, train
from erasec.worlds.base import open_world
from erasec.worlds.work import Work


def work_in(folder: Path) -> Work:
    folder.mkdir()
    return Work(open_world("glyphs", None), folder, "cpu", scale=0.001)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Two steps of every stage but the twin, the judges and the decoder."""
    work = work_in(tmp_path_factory.mktemp("world") / "work")
    for stage in ("render", "vae", "text", "latents", "unet"):
        train.run_stage(work, stage)
    return work


@pytest.mark.slow
def test_what_is_trained_so_far_is_written_and_taken(trained: Work, tmp_path: Path) -> None:
    (trained.root / "unet" / "done").unlink()
    published.pack(trained, tmp_path / "weights")
    progress = json.loads((tmp_path / "weights" / published.PROGRESS).read_text())
    assert progress == {"unet": 2, "twin": 0, "judge-a": 0, "judge-b": 0, "decoder": 0}
    other = work_in(tmp_path / "other")
    (other.root / "tokenizer").mkdir()
    (other.root / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")  # as a rendering here leaves it
    assert published.take(other, tmp_path / "weights") == ["text", "vae", "unet"]
    merges = [(work.root / "tokenizer" / "merges.txt").read_bytes() for work in (trained, other)]
    assert merges[0] == merges[1]  # the encoder reads the tokens that it was trained with
    assert other.done("text") and other.done("vae") and not other.begun("decoder")
    assert other.step("unet") == 2 and not other.done("unet")
    for stage, part in (("text", "text"), ("text", "pair"), ("vae", "vae"), ("unet", "average")):
        before, after = trained.load(stage, part), other.load(stage, part)
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[key].float(), after[key].float(), atol=2e-3) for key in before), part
    assert published.take(other, tmp_path / "weights") == []
    for stage in ("render", "latents"):
        train.run_stage(other, stage)
    other.world.steps["unet"] = 4000  # two steps more at this scale
    train.run_stage(other, "unet")
    assert other.step("unet") == 4


@pytest.mark.slow
def test_a_finished_training_has_no_list_of_what_is_missing(trained: Work, tmp_path: Path) -> None:
    for stage in ("unet", "twin", "judge-a", "judge-b", "decoder"):
        (trained.root / stage).mkdir(exist_ok=True)
        (trained.root / stage / "done").write_text("")
    published.pack(trained, tmp_path / "weights")
    assert not (tmp_path / "weights" / published.PROGRESS).exists()


def test_nothing_is_written_before_the_latents(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="no weights of glyphs to write yet"):
        published.pack(work_in(tmp_path / "work"), tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
