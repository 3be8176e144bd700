"""The edit by degrees: what lies between the base and the audited model, and that its rows are no attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_audit import hits, row

from erasec.audit.base import DIAGNOSTICS
from erasec.audit.bench import Bench, Settings
from erasec.audit.subject import Subject
from erasec.audit.tracing import Tracing, moved, scaled
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.glyphs.judge import GlyphJudge
from erasec.model.edit import Dense, Edit
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.recipe.concept import find


def edited(model: Model, size: float = 0.5) -> Model:
    """The model with random changes: keys and values of cross-attention, and a tensor of the text encoder."""
    rng = torch.Generator().manual_seed(3)
    text = next(site for site in model.parameters if site.component == "text_encoder" and len(site.shape) == 2)
    sites = (*model.select("cross", "kv"), text)
    deltas = {site: Dense(size * torch.randn(site.shape, generator=rng)) for site in sites}
    return model.with_edit(Edit(deltas, "by hand", ("star",), ""))


@pytest.fixture(scope="module")
def bench(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A base, an edited copy of it as a folder, and the base once more as the twin."""
    base = load(str(random_folder))
    folder = tmp_path_factory.mktemp("traced") / "hf"
    changed = edited(base)
    base.source.write(folder, changed.merged())
    models = {"model": load(str(folder)), "base": base, "twin": load(str(random_folder))}
    subjects: Any = {role: Subject(role, model, Context()) for role, model in models.items()}
    return Bench(find("star", "glyphs"), subjects, GlyphJudge("b"), None, Settings(images=2, steps=2, guidance=2.0))


def test_only_what_the_edit_changed_is_scaled(bench: Bench) -> None:
    base, model = bench.base.model, bench.subjects["model"].model  # type: ignore[attr-defined]
    changes = moved(base, model)
    assert set(changes) == set(edited(base).edited_sites)
    assert moved(base, edited(base)).keys() == changes.keys()  # an edit that is in no file yet


def test_the_scaled_weights_lie_on_the_line_from_the_base_to_the_model(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    base = bench.base.model
    for share in (0.0, 0.5, 2.0):
        between = scaled(bench, subject, share).model
        for site in moved(base, subject.model):
            first, last = base.weight(site), subject.model.weight(site)
            assert torch.allclose(between.weight(site), first + share * (last - first), atol=1e-6)
    assert scaled(bench, subject, 1.0) is subject
    site = next(iter(moved(base, subject.model)))
    assert torch.equal(scaled(bench, subject, 0.0).model.merged_weight(site), base.stored_weight(site))
    assert scaled(bench, subject, 0.5).digest not in (subject.digest, scaled(bench, subject, 0.25).digest)


def test_without_a_change_of_weights_there_is_nothing_to_scale(bench: Bench) -> None:
    with pytest.raises(ErasecError, match="weights of the twin are those of the base"):
        scaled(bench, bench.subjects["twin"], 0.5)  # type: ignore[arg-type]


def test_the_curve_begins_at_the_base_and_ends_at_the_model(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    attempts = list(Tracing(parts=2).attack(bench, subject))
    assert [attempt.variant for attempt in attempts] == [f"{share} of the edit" for share in ("0%", "50%", "100%")]
    prompts, settings = bench.prompts("name"), bench.settings
    for attempt, end in ((attempts[0], bench.base), (attempts[2], subject)):
        plain = end.pictures(prompts, bench.seeds("tracing", len(prompts)), settings.steps, settings.guidance)
        assert np.array_equal(attempt.pictures[:, 0], plain)
    drifts = [attempt.measured["drift"] for attempt in attempts]
    assert drifts[0] == 0 < drifts[1] and drifts[2] > 0
    assert [attempt.measured["share"] for attempt in attempts] == [0, 0.5, 1]


def test_a_reference_has_no_edit_and_is_painted_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    paint = Subject.pictures

    def counted(self: Subject, *arguments: Any) -> Any:
        asked.append(1)
        return paint(self, *arguments)

    monkeypatch.setattr(Subject, "pictures", counted)
    attempts = list(Tracing().attack(bench, bench.subjects["twin"]))  # type: ignore[arg-type]
    assert len(attempts) == 5 and len(asked) == 1
    assert all(np.array_equal(attempt.pictures, attempts[0].pictures) for attempt in attempts)


def test_its_rows_bring_nothing_back() -> None:
    assert Tracing.name in DIAGNOSTICS
    found = row("tracing", "0% of the edit", "training", hits(20, 0, 20, 0))
    assert found.separates and found.diagnostic and not found.brings_back
    assert row("relearn", "after 10 steps", "training", hits(20, 0, 20, 0)).brings_back
