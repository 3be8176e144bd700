"""What lets a training fit a memory."""

from __future__ import annotations

import pytest

from erasec import registry
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.view import Model
from erasec.passes.esd import Esd
from erasec.recipe import concept as concepts
from erasec.training import measures
from erasec.training.base import Learned, Measures
from erasec.training.measures import choose, parse_memory, peak

CONCEPTS = (concepts.find("star", "glyphs"),)


@pytest.fixture(scope="module")
def model() -> Model:
    return loading.load("glyphs")


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 0), ("8GB", 8 * 10**9), ("8 GiB", 8 * 2**30), ("1.5G", 1_500_000_000), ("700MB", 7 * 10**8), ("1024", 1024)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["much", "8TB", "-1GB", "0GB", "GB"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ErasecError, match="is no size"):
        parse_memory(text)


def test_every_measure_lowers_the_peak(model: Model) -> None:
    step = Esd(batch=8)
    row = [Measures(), Measures(checkpointing=True), Measures(4, True), Measures(1, True)]
    row.append(Measures(1, True, "adamw-8bit"))
    peaks = [peak(step, model, CONCEPTS, "cuda", each) for each in row]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert peak(step, model, CONCEPTS, "cpu", row[0]) > peaks[0]  # bfloat16 takes half


def test_the_quickest_measures_that_fit_are_chosen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Esd(batch=4)  # with the kept rows, eight at once
    whole, again, least = (
        peak(step, model, CONCEPTS, "cpu", each) for each in (Measures(), Measures(0, True), Measures(1, True))
    )
    assert choose(step, model, CONCEPTS, "cpu", int(whole) + 1) == Measures()
    assert choose(step, model, CONCEPTS, "cpu", int(whole) - 1) == Measures(checkpointing=True)
    parts = choose(step, model, CONCEPTS, "cpu", int(again) - 1)
    assert 0 < parts.rows < 8 and peak(step, model, CONCEPTS, "cpu", parts) < again
    assert choose(step, model, CONCEPTS, "cpu", int(least) + 1) == Measures(1, True)
    with pytest.raises(ErasecError, match="esd does not fit") as caught:
        choose(step, model, CONCEPTS, "cpu", int(least) - 1)
    assert "--memory" in caught.value.fix and "rank=8" in caught.value.fix
    # Only a GPU gets an optimizer of 8 bits, and only where bitsandbytes is installed.
    small = int(peak(step, model, CONCEPTS, "cuda", Measures(1, True))) - 1
    monkeypatch.setattr(measures, "_has_8bit", lambda: False)
    with pytest.raises(ErasecError, match="esd does not fit") as caught:
        choose(step, model, CONCEPTS, "cuda", small)
    assert "erasec[memory]" in caught.value.why
    monkeypatch.setattr(measures, "_has_8bit", lambda: True)
    assert choose(step, model, CONCEPTS, "cuda", small) == Measures(1, True, "adamw-8bit")
    with pytest.raises(ErasecError, match="esd does not fit"):
        choose(step, model, CONCEPTS, "cpu", small)


@pytest.mark.parametrize("name", sorted(registry.passes()))
def test_every_pass_counts_its_work(model: Model, name: str) -> None:
    kind = registry.load_pass(name)
    work = kind().work(model, CONCEPTS[0])
    assert work.prompts > 0
    learned = issubclass(kind, Learned)
    assert (work.trained_rows > 0) is (work.graph_rows > 0) is learned
    if not learned:
        return
    twice = kind(steps=2 * kind.steps).work(model, CONCEPTS[0])
    # Of harden one search more, after the training.
    last = getattr(kind, "final_steps", 0)
    assert twice.trained_rows - last * kind.batch == 2 * (work.trained_rows - last * kind.batch)
    assert twice.trained_calls - last == 2 * (work.trained_calls - last)
    wide = kind(batch=2 * kind.batch).work(model, CONCEPTS[0])
    assert wide.graph_rows == 2 * work.graph_rows and wide.trained_calls == work.trained_calls
