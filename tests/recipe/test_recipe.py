"""Recipes: they survive a round trip through TOML, come from flags, and errors name the key at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erasec.errors import ErasecError
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import (
    Limits,
    NamedOptions,
    Recipe,
    code_file,
    code_files,
    from_file,
    from_flags,
    from_toml,
    parse_named_options,
    to_toml,
)

words = st.text(min_size=1, max_size=12).map(str.strip).filter(bool)
numbers = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
options = st.dictionaries(
    words, st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
concepts = st.builds(
    Concept,
    name=words,
    erase=st.lists(words, min_size=1, max_size=2).map(tuple),
    anchor=st.text(max_size=9),
    keep=st.lists(words, max_size=2).map(tuple),
)


@st.composite
def recipe(draw: st.DrawFn) -> Recipe:
    return Recipe.model_validate(
        {
            "model": draw(words),
            "revision": draw(st.text(max_size=9)),
            "digest": draw(st.sampled_from(["", "0f" * 32])),
            "erase": draw(st.lists(words, max_size=2)),
            "targets": draw(st.lists(words, max_size=2)),
            "keys": draw(st.lists(words, max_size=2)),
            "absorb": draw(numbers),
            "seed": draw(st.integers(0, 2**31 - 1)),
            "device": draw(st.sampled_from(["auto", "cpu", "cuda:1"])),
            "pass": draw(st.lists(st.builds(NamedOptions, name=words, options=options), max_size=2)),
            "checks": draw(st.builds(Limits, erased=numbers, implicit=st.none() | numbers, images=st.integers(1, 99))),
            "concept": draw(st.lists(concepts, max_size=2, unique_by=lambda concept: concept.name)),
        }
    )


@given(recipe())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_recipe_comes_back_from_toml_as_it_was(original: Recipe) -> None:
    back = from_toml(to_toml(original))
    assert back == original
    kinds = [[type(value) for _, value in sorted(use.options.items())] for use in original.passes]
    assert [[type(value) for _, value in sorted(use.options.items())] for use in back.passes] == kinds
    assert to_toml(back) == to_toml(original)


def test_the_layout_of_a_written_recipe() -> None:
    original = from_flags("glyphs", ["star"], ["uce:ridge=0.5,rows=last"], ["onnx"])
    lines = to_toml(original).splitlines()
    assert lines[:2] == ['erasec = "0.1"', 'model = "glyphs"']
    start = lines.index("[[pass]]") + 1
    assert lines[start : start + 5] == ['name = "uce"', "[pass.options]", "ridge = 0.5", 'rows = "last"', ""]
    assert "implicit" not in to_toml(original)  # TOML has no null: None is left out


def test_a_target_and_a_key_are_given_once_and_in_their_order() -> None:
    assert from_flags("glyphs").targets == ()
    original = from_flags("glyphs", targets=["onnx", "hf", "onnx"], keys=["b.key", "a.key", "b.key"])
    assert (original.targets, original.keys) == (("onnx", "hf"), ("b.key", "a.key"))


def test_keys_and_absorb_come_from_flags_and_are_written_if_they_are_given() -> None:
    original = from_flags("glyphs", keys=["star.key"], absorb=0.5)
    assert 'keys = [\n    "star.key",\n]\n' in to_toml(original) and "absorb = 0.5" in to_toml(original)
    assert from_toml(to_toml(original)) == original
    plain = to_toml(from_flags("glyphs"))
    assert "keys" not in plain and "absorb" not in plain


def test_flags_replace_the_keys_of_a_recipe_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('model = "glyphs"\nerase = ["star"]\nseed = 3\n[[pass]]\nname = "uce"\n[checks]\nimages = 5\n')
    assert from_flags(str(file)) == from_file(file)
    changed = from_flags(str(file), erase=["ring"], seed=0)
    assert (changed.erase, changed.seed, changed.checks.images) == (("ring",), 0, 5)
    assert changed.passes == from_file(file).passes


@pytest.mark.parametrize(
    ("text", "name", "read"),
    [
        ("uce", "uce", {}),
        (
            "uce:rows=tail,ridge=0.1,scale=2,on=true,e=1e-3",
            "uce",
            {"rows": "tail", "ridge": 0.1, "scale": 2, "on": True, "e": 1e-3},
        ),
        ("a/my.py:Mine", "a/my.py:Mine", {}),
        ("my.py:Mine:where=a:b,x=nan", "my.py:Mine", {"where": "a:b", "x": "nan"}),
    ],
)
def test_passes_are_parsed(text: str, name: str, read: dict[str, object]) -> None:
    use = parse_named_options(text)
    assert use.name == name
    assert {key: (type(value), value) for key, value in use.options.items()} == {
        key: (type(value), value) for key, value in read.items()
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty name"),
        ("uce:ridge", "'ridge' is no option"),
        ("uce:", "'' is no option"),
        ("uce:a=1,b", "'b' is no option"),
        ("uce:a=1,a=2", "'a' is given twice"),
    ],
)
def test_wrong_syntax_of_a_pass_is_refused(text: str, words: str) -> None:
    with pytest.raises(ErasecError, match=words):
        parse_named_options(text)


M = 'model = "glyphs"\n'


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (M + "sede = 1", "r.toml", ("no key 'sede'", "did you mean 'seed'?")),
        (M + '[[pass]]\nname = "uce"\n[[pass]]\nname = "x"\noption = 1', "r.toml, [[pass]] 2 (x)", ("'options'?",)),
        (M + '[[pass]]\nname = "uce"\noptions = { a = [1] }', "r.toml, [[pass]] 1 (uce)", ("a is [1]", "text")),
        (M + '[[pass]]\nname = "uce"\noptions = { a = inf }', "r.toml, [[pass]] 1 (uce)", ("a is inf", "finite")),
        (M + "[[pass]]\noptions = { a = 1 }", "r.toml, [[pass]] 1", ("has no 'name'",)),
        (M + 'pass = ["uce"]', "r.toml, [[pass]] 1", ("pass is 'uce'",)),
        (M + "[checks]\nerasd = 1", "r.toml, [checks]", ("did you mean 'erased'?",)),
        (M + "absorb = -1", "r.toml", ("absorb is -1", "greater than or equal to 0")),
        (M + "[checks]\nimages = 0", "r.toml, [checks]", ("images is 0", "greater than or equal to 1")),
        (M + '[[concept]]\nname = "a"\nerase = ["a"]\nankor = ""', "r.toml, [[concept]] 1 (a)", ("'anchor'?",)),
        (M + '[[concept]]\nname = "a"\nerase = ["a"]\n' * 2, "r.toml", ("two concepts are named 'a'",)),
        (M + 'device = "gpu"', "r.toml", ("no device 'gpu'", "cuda")),
        (M + 'erase = "star"', "r.toml", ("erase is 'star'", "valid list")),
        ("seed = 1", "r.toml", ("has no 'model'",)),
        ("model = ?", "r.toml", ("not TOML", "line 1")),
        (M + 'erasec = "0.2"\nnew_key = 1', "r.toml", ("format 0.2", "up to 0.1", "--upgrade")),
        (M + "erasec = 0.1", "r.toml", ("erasec is 0.1", "string")),
    ],
)
def test_an_error_names_the_place_and_the_nearest_key(text: str, where: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ErasecError) as caught:
        from_toml(text, "r.toml")
    assert caught.value.where == where
    for word in words:
        assert word in str(caught.value)


def test_a_missing_recipe_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match=r"the recipe cannot be read\n +in: .*none\.toml\n +why: there is no such"):
        from_flags(str(tmp_path / "none.toml"))


CODE = {
    "pass": '[[pass]]\nname = "evil.py:X"',
    "targets": 'targets = ["hf", "evil.py:X:a=1"]',
    "judge": 'judge = "~/evil.py:X"',
}


@pytest.mark.parametrize("key", CODE)
def test_a_recipe_that_names_code_needs_permission(tmp_path: Path, key: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f'model = "glyphs"\nerase = ["star"]\n{CODE[key]}\n')
    for read in (from_file, lambda path: from_flags(str(path), erase=["heart"])):
        with pytest.raises(ErasecError, match=r"the recipe names Python code: .*evil\.py") as caught:
            read(file)
        assert "--allow-code" in caught.value.fix and str(file) == caught.value.where
    assert from_file(file, allow_code=True) == from_flags(str(file), allow_code=True)
    assert code_files(from_file(file, allow_code=True)) == [code_file("~/evil.py:X" if key == "judge" else "evil.py:X")]
    other: dict[str, Any] = {"pass": {"passes": ["uce"]}, "targets": {"targets": ["ldm"]}, "judge": {"judge": "glyphs"}}
    assert from_flags(str(file), **other[key]).model == "glyphs"  # the flag replaces the key


def test_a_flag_and_a_plain_name_need_no_permission(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('model = "glyphs"\nerase = ["star"]\n[[pass]]\nname = "uce"\n')
    recipe = from_flags(
        str(tmp_path / "recipe.toml"), passes=["mine.py:X:a=1"], targets=["mine.py:Y"], judge="mine.py:Z"
    )
    assert recipe.passes[0].name == "mine.py:X"
    assert code_file("uce") is code_file("") is code_file("uce:rows") is None
