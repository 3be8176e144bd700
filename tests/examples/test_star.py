from __future__ import annotations

from pathlib import Path

from erasec import registry
from erasec.options import configure
from erasec.recipe import recipe


def test_the_example_recipe_is_that_of_the_demos_flags(root: Path) -> None:
    example = recipe.from_file(root / "examples" / "star.toml")
    flags = recipe.from_flags("glyphs", erase=["star"], targets=["onnx"])
    assert example.model_copy(update={"passes": ()}) == flags
    assert example.passes


def test_the_options_of_its_passes_are_valid(root: Path) -> None:
    for use in recipe.from_file(root / "examples" / "star.toml").passes:
        configure(registry.load_pass(use.name), use.options, use.name)
