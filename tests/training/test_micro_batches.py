"""A micro-batch changes the memory of a training and not its result, whatever the losses of the pass are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from glyph_passes import tuned

from erasec import registry
from erasec.model import loading
from erasec.model.edit import Edit
from erasec.model.view import Model
from erasec.recipe import concept as concepts
from erasec.training import loop
from erasec.training.base import Learned, Measures, TrainingContext
from erasec.training.denoiser import Denoiser

SMALL: dict[str, int | str | float] = {
    "steps": 2,
    "trajectories": 2,
    "sample_steps": 2,
    "images": 3,
    "min_cosine": 0.0,
    "max_rise": 0.0,
    "searches": 2,
    "final_steps": 2,
}
# The watermark is in images of glyphs; safegen and geom_erasing need images that show what they erase.
CONCEPTS = {"geom_erasing": "watermark"}
# safegen samples, decodes and encodes its images in parts as well, and its loss is steep.
LIMITS = {"safegen": 2e-4}
LEARNED = [name for name in sorted(registry.passes()) if issubclass(registry.load_pass(name), Learned)]


@cache
def glyphs() -> Model:
    """One model for all trainings, so that its text encoder is loaded once."""
    return loading.load("glyphs")


def solved(name: str, batch: int, rows: int = 0) -> dict[str, torch.Tensor]:
    """What the pass trains in two steps, by name."""
    kind = registry.load_pass(name)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    options: dict[str, Any] = {key: value for key, value in SMALL.items() if key in known} | {"batch": batch}
    if name in CONCEPTS | {"safegen": ""}:
        options |= {"images": 16, "sample_steps": 8}
    if name == "harden":  # with its weight of 100, plain descent at this rate multiplies rounding
        options["keep"] = 1.0
    context = TrainingContext("cpu", measures=Measures(rows) if rows else None)
    concept = concepts.find(CONCEPTS.get(name, "star"), "glyphs")
    edit = tuned(kind, **options).solve(glyphs(), concept, context)
    return tensors(edit)


def tensors(edit: Edit) -> dict[str, torch.Tensor]:
    found = {site.key: getattr(delta, "value", None) for site, delta in edit.deltas.items()}
    result = {key: value for key, value in found.items() if value is not None}
    if edit.secret:
        result |= {"k_rows": edit.secret.k_rows, "v_rows": edit.secret.v_rows}
    return result | edit.tokens


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors, relative to that of the first."""
    assert first.keys() == second.keys() and first
    moved = sum(float((first[key].double() - second[key].double()).square().sum()) for key in first)
    return float((moved / sum(float(value.double().square().sum()) for value in first.values())) ** 0.5)


class Sgd(torch.optim.SGD):
    """Plain descent: Adam's first steps have the same size whatever the gradient is, so that they turn the rounding of
    a gradient near zero into whole steps. The rate is large, for changes that float32 holds to many digits."""

    def __init__(self, parameters: list[torch.Tensor], lr: float, *_: object) -> None:
        super().__init__(parameters, 0.5)


@pytest.fixture
def descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "optimizer_class", lambda name: Sgd)


@pytest.mark.usefixtures("descent")
@pytest.mark.parametrize("name", LEARNED)
def test_a_pass_gives_the_same_edit_in_micro_batches(name: str) -> None:
    """In unequal parts. The control: another batch is another edit, by far more than rounding."""
    whole = solved(name, 4)
    assert distance(whole, solved(name, 4, 3)) < LIMITS.get(name, 1e-5)
    assert distance(whole, solved(name, 2)) > 1e-3


def test_with_adam_the_edit_is_the_same_to_the_rounding_of_small_gradients() -> None:
    assert distance(solved("esd", 4), solved("esd", 4, 1)) < 1e-3 < distance(solved("esd", 4), solved("esd", 2))


def test_a_part_holds_the_activations_of_its_rows_alone() -> None:
    """What a prediction keeps for the backward pass, in values: without parts all activations, with them the inputs."""

    def kept(rows: int) -> int:
        context = TrainingContext("cpu", measures=Measures(rows))
        denoiser = Denoiser(glyphs(), context)
        denoiser.unet.conv_in.weight.requires_grad_(True)
        sizes: list[int] = []

        def pack(value: torch.Tensor) -> torch.Tensor:
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            denoiser.predict(denoiser.draw(range(4)), torch.full((4,), 500), denoiser.states(["a star"] * 4))
        return sum(sizes)

    whole, parts = kept(0), kept(1)
    assert parts < whole / 50


def test_predictions_without_gradients_are_made_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(glyphs(), TrainingContext("cpu", measures=Measures(3)))
    sizes: list[int] = []
    predict = denoiser._predict
    monkeypatch.setattr(denoiser, "_predict", lambda *rows: sizes.append(len(rows[0])) or predict(*rows))
    denoiser.sample(["a star"] * 7, list(range(7)), 1, 1.0)
    assert sizes == [3, 3, 1]
