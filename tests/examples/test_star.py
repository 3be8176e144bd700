from __future__ import annotations

from pathlib import Path

from erasec import registry
from erasec.base import with_options
from erasec.recipe import recipe


def test_the_example_recipe_is_what_the_demo_s_flags_ask_for(root: Path) -> None:
    example = recipe.from_file(root / "examples" / "star.toml")
    flags = recipe.from_flags("glyphs", erase=["star"], targets=["onnx"])
    assert example.model_copy(update={"passes": ()}) == flags
    assert example.passes


def test_its_passes_take_their_options(root: Path) -> None:
    for use in recipe.from_file(root / "examples" / "star.toml").passes:
        with_options(registry.load_pass(use.name), use.options, use.name)
