"""A subject with tokens of its own: they are added once, also where text encoders are shared or released."""

from __future__ import annotations

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
