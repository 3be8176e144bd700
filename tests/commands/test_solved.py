"""Edits in the store: the same inputs give the same edit without solving, and any other input solves anew."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from glyph_passes import tuned

from erasec.base import Context, Pass
from erasec.commands import solved
from erasec.commands.solved import Solver
from erasec.model.edit import Edit
from erasec.model.view import Model
from erasec.passes.eiup import Eiup
from erasec.passes.esd import Esd
from erasec.passes.kpop import Kpop
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
HEART = Concept(name="heart", erase=("heart",), anchor="ring")
KEY = Solver._key  # modules are imported before fixtures run
TRAINED = {"steps": 2, "trajectories": 2, "sample_steps": 3, "batch": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Solver, "_key", KEY)  # which tests/conftest.py replaces
    return tmp_path / "cache"


def solve(
    model: Model, *steps: Pass, concepts: tuple[Concept, ...] = (STAR,), fresh: bool = False, **context: Any
) -> list[tuple[Edit, bool]]:
    solver, made = Solver(model, fresh), []
    for step in steps:
        for edit, stored in solver.solve(step, model, concepts, Context(**context)):
            model = model.with_edit(edit)
            made.append((edit, stored))
    return made


def same(one: Edit, two: Edit) -> bool:
    """Whether two edits write the same bytes and say the same."""
    if one.deltas.keys() != two.deltas.keys():
        return False
    parts = zip((vars(one.deltas[site]) for site in one.deltas), (vars(two.deltas[s]) for s in one.deltas), strict=True)
    tensors = all(torch.equal(a[name], b[name]) for a, b in parts for name in a if isinstance(a[name], torch.Tensor))
    facts = [
        (edit.by, edit.concepts, edit.base, dict(edit.params), dict(edit.stats), edit.phrases) for edit in (one, two)
    ]
    curves = [{name: list(values) for name, values in edit.curves.items()} for edit in (one, two)]
    return tensors and facts[0] == facts[1] and curves[0] == curves[1]


@pytest.mark.parametrize("step", [Uce(), tuned(Esd, **TRAINED)], ids=["uce", "esd"])
def test_the_second_time_the_same_edit_comes_from_the_store(base: Model, step: Pass) -> None:
    (first, stored), (second, again) = *solve(base, step), *solve(base, step)
    assert (stored, again) == (False, True)
    assert same(first, second) and (first.curves or isinstance(step, Uce))
    (third, afresh) = solve(base, step, fresh=True)[0]
    assert not afresh and same(first, third)


def test_what_decides_an_edit_is_part_of_its_key(base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve(base, Uce())
    assert solve(base, Uce())[0][1]
    for other in (Uce(keep=2.0), Uce(rows="last")):
        assert not solve(base, other)[0][1], other
    assert not solve(base, Uce(), seed=1)[0][1]
    assert not solve(base, Uce(), concepts=(STAR.model_copy(update={"anchor": "square"}),))[0][1]
    assert not solve(base, Uce(), concepts=(STAR, HEART))[0][1]
    monkeypatch.setattr(solved, "code_digest", lambda: "another version")
    assert not solve(base, Uce())[0][1]


def test_the_content_of_a_file_that_an_option_names_is_part_of_the_key(base: Model, tmp_path: Path) -> None:
    solver, file = Solver(base), tmp_path / "coco.prior.safetensors"
    keys = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        keys.append(solver._key(Uce(prior=str(file)), [STAR], Context()))
    assert keys[0] != keys[1]


def test_an_option_that_no_path_can_be_is_no_file(base: Model) -> None:
    for words in ("x" * 300, "~uwu", "кот" * 50):
        assert Solver(base)._key(Eiup(words=words), [STAR], Context())


def test_another_version_of_what_an_edit_is_computed_with_is_another_key(
    base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, version = Solver(base)._key(Uce(), [STAR], Context()), metadata.version
    for name in ("torch", "bitsandbytes", "nudenet", "onnxruntime"):
        monkeypatch.setattr(metadata, "version", lambda other, name=name: "9" if other == name else version(other))
        assert Solver(base)._key(Uce(), [STAR], Context()) != key, name
    monkeypatch.undo()
    monkeypatch.setattr(solved.registry, "distributions", lambda: {"their-package": "2.0"})
    assert Solver(base)._key(Uce(), [STAR], Context()) != key


def test_another_model_is_another_key(base: Model, tmp_path: Path) -> None:
    from random_models import random_pipeline

    from erasec.model import loading

    random_pipeline(tmp_path / "other", seed=5, dtype=torch.float16)
    solve(base, Uce())
    assert not solve(loading.load(str(tmp_path / "other")), Uce())[0][1]


def test_a_pass_is_solved_on_what_the_passes_before_it_left(base: Model) -> None:
    solve(base, Uce(keep=2.0), Uce())
    assert [stored for _, stored in solve(base, Uce(keep=2.0), Uce())] == [True, True]
    assert [stored for _, stored in solve(base, Uce(keep=3.0), Uce())] == [False, False]


def test_a_second_concept_costs_only_its_own_training(base: Model) -> None:
    step = tuned(Esd, **TRAINED)
    solve(base, step)
    assert [stored for _, stored in solve(base, step, concepts=(STAR, HEART))] == [True, False]
    assert [stored for _, stored in solve(base, step, concepts=(STAR, HEART))] == [True, True]


def test_secrets_are_not_stored_nor_what_is_solved_on_them(base: Model, cache: Path) -> None:
    step = tuned(Kpop, **TRAINED)
    for _ in range(2):
        assert [stored for _, stored in solve(base, step, Uce())] == [False, False]
    assert not list(cache.glob("edits/*"))


@pytest.mark.parametrize("judge", ["clip:model=/some/folder", "judge.py:Judge"])
def test_what_a_local_judge_teaches_is_not_stored(base: Model, cache: Path, judge: str) -> None:
    for _ in range(2):
        assert not solve(base, Uce(), judges=(judge,))[0][1]
    assert not list(cache.glob("edits/*"))


def test_the_processes_of_one_training_do_not_use_it(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    solve(base, Uce())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not solve(base, Uce())[0][1]


def test_a_damaged_edit_is_solved_again(base: Model, cache: Path) -> None:
    ((first, _),) = solve(base, Uce())
    (file,) = cache.glob(f"edits/*/{solved.EDITS}")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ((second, stored),) = solve(base, Uce())
    assert not stored and same(first, second)
    assert solve(base, Uce())[0][1]


def test_nothing_of_an_edit_is_lost(base: Model) -> None:
    """What an edit file leaves out, and the order of options, which the report has."""
    (edit,) = Uce().solve_all(base, [STAR], Context())
    fields = {name for name in vars(edit) if getattr(edit, name)}
    marked = replace(edit, curves={"loss": [1.0, 0.5]}, negative="stars")
    solved._save("key", [marked], base.with_edit(marked))
    ((again,),) = (solved._load("key"),)
    assert {name for name in vars(again) if getattr(again, name)} == fields | {"curves", "negative"}
    assert same(marked, again) and json.dumps(again.params) == json.dumps(dict(edit.params))
