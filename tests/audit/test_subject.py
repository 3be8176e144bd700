"""A subject: tokens of its own are added once, and a side limits the size of its pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from erasec.audit.subject import Subject
from erasec.base import Context
from erasec.model.edit import Dense, Edit
from erasec.model.loading import load
from erasec.model.view import Model

NAME = "<place-0>"


def with_token(folder: Path) -> Model:
    row = torch.linspace(-1, 1, 128)
    return load(str(folder)).with_edit(Edit({}, "by hand", ("star",), "", tokens={NAME: row}))


def test_tokens_come_back_after_a_release(random_folder: Path) -> None:
    subject = Subject("model", with_token(random_folder), Context())
    before = subject.states([f"a {NAME} star"])
    subject.release()
    subject._states.clear()
    assert torch.equal(subject.states([f"a {NAME} star"]), before)
    plain = Subject("model", load(str(random_folder)), Context()).states([f"a {NAME} star"])
    assert not torch.allclose(plain, before)


def test_two_subjects_may_share_the_text_encoder_of_a_view(random_folder: Path) -> None:
    model = with_token(random_folder)
    site = model.select("cross", "k")[0]
    other = model.with_edit(Edit({site: Dense(torch.zeros(site.shape))}, "by hand", ("star",), ""))
    states = [Subject("model", view, Context()).states([f"a {NAME}"]) for view in (model, other)]
    assert torch.equal(*states)
    alone = Subject("model", replace(load(str(random_folder)), edits=model.edits), Context())
    assert torch.equal(alone.states([f"a {NAME}"]), states[0])


def test_a_side_shrinks_what_the_denoiser_runs_on(random_folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(random_folder, large)
    path = large / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sample_size": 4 * config["sample_size"]}))
    model = load(str(large))
    whole, half, tiny = (Subject("model", model, Context(side=side)) for side in (0, 128, 1))
    factor = whole.denoiser.size // whole.denoiser.shape[1]
    assert whole.noise([1]).shape[2:] == (4 * config["sample_size"],) * 2
    assert half.noise([1]).shape[2] == 128 // factor and tiny.noise([1]).shape[2] == 64 // factor
    pictures = half.pictures(["a star"], [1], 1, 1.0)
    assert pictures.shape == (1, 128, 128, 3)
    assert half.encode(pictures).shape[2] == 128 // factor
