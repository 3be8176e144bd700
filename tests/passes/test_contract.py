"""The contract of every pass, whatever it computes. Passes come from the registry, so new ones are tested too."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glyph_passes import tuned
from PIL import Image
from random_models import random_pipeline
from torch import Tensor

from erasec import registry
from erasec.base import Context, Pass
from erasec.checkpoint.safetensors import read_tensor
from erasec.closed_form.base import ClosedForm
from erasec.errors import ErasecError
from erasec.family import Site
from erasec.model import loading
from erasec.model.edit import Edit
from erasec.model.view import Model
from erasec.options import configure
from erasec.recipe import recipe
from erasec.recipe.concept import Concept

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
NAMES = sorted(registry.passes())
SMALL: dict[str, int | str] = {
    "steps": 2,
    "trajectories": 2,
    "sample_steps": 3,
    "images": 2,
    "batch": 2,
    "min_cosine": 0.0,
    "max_rise": 0.0,
    "searches": 2,
    "final_steps": 2,
}

pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def triplets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Images for the passes that learn from images: no judge knows a random model, so they cannot be made."""
    folder, rng = tmp_path_factory.mktemp("triplets"), np.random.default_rng(0)
    for part in ("concept", "censored", "benign"):
        (folder / part).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
    SMALL["triplets"] = str(folder)
    (folder / "boxes.csv").write_text(
        "file,left,top,right,bottom\nconcept/0.png,0,0,64,9\nconcept/1.png,0,9,64,64\nbenign/0.png,,,,\n"
    )
    SMALL["boxes"] = str(folder)


def small(name: str) -> Pass:
    """The pass as for glyphs, whose layout the random model has; where it trains, with a training of seconds."""
    kind = registry.load_pass(name)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return tuned(kind, **{key: value for key, value in SMALL.items() if key in known})


def change_at(base: Model, edit: Edit, site: Site) -> Tensor:
    return edit.deltas[site].change(base.stored_weight(site))


def test_only_its_sites_move_and_all_else_is_identical(name: str, base: Model, tmp_path: Path) -> None:
    step = small(name)
    edit = step.solve(base, CONCEPT, Context())
    edited = base.with_edit(edit)
    base.source.write(tmp_path, edited.merged())
    allowed = {(site.component, site.key) for site in step.sites(base)}
    changed = set()
    for component in base.family.components:
        old, new = base.source.entries(component), loading.load(str(tmp_path)).source.entries(component)
        assert {k: (e.dtype, e.shape) for k, e in old.items()} == {k: (e.dtype, e.shape) for k, e in new.items()}
        for key in old:
            before, after = read_tensor(old[key]), read_tensor(new[key])
            assert bool(after.isfinite().all())
            if not torch.equal(before, after):
                changed.add((component, key))
    assert changed <= allowed
    # What the edit carries besides changes of weights is what the pass says in ``extras``.
    left = {"memory": edit.memories, "tokens": edit.tokens, "negative": edit.negative}
    assert {extra for extra, value in left.items() if value} == set(step.extras)
    assert bool(changed) == bool(allowed)
    assert changed or step.extras


def test_the_base_is_unchanged_and_the_edit_is_deterministic(name: str, base: Model) -> None:
    digest = loading.load(str(base.source.root)).digest
    one, two = (small(name).solve(base, CONCEPT, Context(seed=3)) for _ in range(2))
    assert loading.load(str(base.source.root)).digest == digest
    assert one.deltas.keys() == two.deltas.keys()
    assert all(torch.equal(change_at(base, one, site), change_at(base, two, site)) for site in one.deltas)
    assert len(one.memories) == len(two.memories)
    for before, after in zip(one.memories, two.memories, strict=True):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
    assert one.tokens.keys() == two.tokens.keys()
    assert all(torch.equal(one.tokens[token], two.tokens[token]) for token in one.tokens)
    assert one.negative == two.negative
    assert one.stats == two.stats
    assert (one.by, one.concepts, one.base) == (name, ("star",), base.digest)


def test_a_concept_that_becomes_itself_moves_nothing(name: str, base: Model) -> None:
    if not issubclass(registry.load_pass(name), ClosedForm):
        return  # training changes weights whatever the concept is
    same = Concept(name="star", erase=("star",), anchor="star", keep=("square",))
    edit = small(name).solve(base, same, Context())
    assert all(float(change_at(base, edit, site).abs().max()) < 1e-9 for site in edit.deltas)
    assert all(torch.equal(base.with_edit(edit).merged_weight(site), base.stored_weight(site)) for site in edit.deltas)


def test_it_starts_from_the_edited_model(name: str, base: Model) -> None:
    first = small(name).solve(base, CONCEPT, Context())
    other = Concept(name="heart", erase=("heart",), anchor="square", keep=("circle",))
    after, alone = (small(name).solve(m, other, Context()) for m in (base.with_edit(first), base))
    edited = base.with_edit(first)
    changes = [(after.deltas[site].change(edited.weight(site)), change_at(base, alone, site)) for site in after.deltas]
    changes += [(one.values, two.values) for one, two in zip(after.memories, alone.memories, strict=True)]
    changes += [(after.tokens[token], alone.tokens[token]) for token in after.tokens]
    # After an edit that changes no weight, the next pass starts from the same weights.
    assert any(not torch.equal(one, two) for one, two in changes) == bool(first.deltas)


def test_several_concepts_give_edits_that_name_all_of_them(name: str, base: Model) -> None:
    other = Concept(name="heart", erase=("heart",), anchor="square", keep=("circle",))
    edits = list(small(name).solve_all(base, [CONCEPT, other], Context()))
    named = [concept for edit in edits for concept in edit.concepts]
    assert sorted(named) == ["heart", "star"]
    view = base
    for edit in edits:
        view = view.with_edit(edit)
    assert view.merged().keys() == base.with_edit(edits[0]).merged().keys()


def test_options_round_trip_through_a_recipe_and_a_typo_suggests_the_right_name(name: str, base: Model) -> None:
    kind = registry.load_pass(name)
    options: dict[str, Any] = asdict(kind())  # type: ignore[call-overload]
    use = recipe.NamedOptions(name=name, options=options)
    again = recipe.from_toml(recipe.to_toml(recipe.Recipe(model="glyphs", erase=("star",), **{"pass": (use,)})))
    assert configure(kind, again.passes[0].options, name) == kind()
    option = next(iter(options))
    with pytest.raises(ErasecError, match="no option") as caught:
        configure(kind, {option + "s": options[option]}, name)
    assert f"did you mean {option!r}" in caught.value.why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bases_of_every_precision_keep_their_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    random_pipeline(tmp_path / "base", dtype=dtype)
    base = loading.load(str(tmp_path / "base"))
    edited = base.with_edit(small(name).solve(base, CONCEPT, Context()))
    for tensors in edited.merged().values():
        for key, make in tensors.items():
            tensor = make()
            assert tensor.dtype == dtype, key
            assert bool(tensor.isfinite().all()), key
