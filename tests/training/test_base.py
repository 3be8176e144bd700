"""The base of learned passes: their options, and which tensors a pass trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import random_models
from glyph_passes import tuned

from erasec.errors import ErasecError
from erasec.family import Site
from erasec.model import loading
from erasec.passes.esd import Esd
from erasec.training.base import trainable


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps is 0"), ({"lr": 0.0}, "lr is 0"), ({"rank": -1}, "rank is -1")]
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ErasecError, match=message):
        tuned(Esd, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "selects"),
    [("attn1", lambda site: site.attn == "self"), ("attn2", lambda site: site.attn == "cross")],
)
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_attention_is_selected_with_its_biases_and_nothing_else_is(
    tmp_path: Path, family: str, module: str, selects: Callable[[Site], bool]
) -> None:
    random_models.random_folder(tmp_path, family, "tiny")
    model = loading.load(str(tmp_path))
    selected = {site.key for site in trainable(model, selects)}
    assert selected == {key for key in model.entries("unet") if f".{module}." in key}
    assert any(key.endswith(".bias") for key in selected)
    matrices = {site.key for site in trainable(model, selects, rank=2)}
    assert matrices == {key for key in selected if key.endswith(".weight")}
