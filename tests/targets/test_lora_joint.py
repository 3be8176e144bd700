"""Target lora of sd3 and flux: a whole pipeline loads the file, and each edited matrix changes as the edit says."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from joint_models import pipeline

from erasec.base import Context
from erasec.checkpoint.safetensors import read_header
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.edit import Edit, LowRank
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.targets.lora import FILE, Lora

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", templates=("a photo of a {}",))

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed, and diffusers loads no LoRA without it"
)


@pytest.fixture(scope="module", params=["sd3", "flux"])
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model with the edit of a pass, which changes what embeds text, and with one of every attention projection."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline(request.param).save_pretrained(folder)
    base = loading.load(str(folder))
    model = base.with_edit(Uce().solve(base, CONCEPT, Context()))
    deltas = {}
    for number, site in enumerate(base.sites):
        generator = torch.Generator().manual_seed(number)
        rank = 1 + number % 3
        left = torch.randn(site.shape[0], rank, generator=generator)
        deltas[site] = LowRank(left, torch.randn(rank, site.shape[1], generator=generator) / 8)
    return model.with_edit(Edit(deltas, "hand", ("none",), ""))


@needs_peft
def test_a_pipeline_applies_the_change_of_every_site(edited: Model, tmp_path: Path) -> None:
    artifact = Lora().export(edited, tmp_path, Context())
    assert all(check.passed for check in artifact.checks)
    assert {key.split(".")[0] for key in read_header(tmp_path / FILE)[0]} == {"transformer"}
    pipe = diffusers.DiffusionPipeline.from_pretrained(edited.source.root)
    before = {key: tensor.clone() for key, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {site.key for site in edited.edited_sites} and len(changed) == len(edited.sites)
    for site in edited.edited_sites:
        change = edited.weight(site) - edited.stored_weight(site).double()
        error = (after[site.key].double() - before[site.key].double() - change).norm() / change.norm()
        assert float(error) < 1e-5, site.key


def test_text_encoders_are_refused(edited: Model, tmp_path: Path) -> None:
    site = next(site for site in edited.parameters if site.component == "text_encoder" and len(site.shape) == 2)
    delta = LowRank(torch.ones(site.shape[0], 1), torch.ones(1, site.shape[1]))
    wrong = replace(edited, edits=(Edit({site: delta}, "hand", ("none",), ""),))
    with pytest.raises(ErasecError, match="in text_encoder cannot be written as a LoRA"):
        Lora().export(wrong, tmp_path, Context())
    assert not list(tmp_path.iterdir())
