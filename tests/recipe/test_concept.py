"""Concept files: the bundled ones are sound, and the error for an invalid one names the fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.glyphs import world
from erasec.recipe import concept as concept_module
from erasec.recipe.concept import LIBRARY, PLACEHOLDER, Concept, find, from_file, from_phrase, library, worlds
from erasec.recipe.recipe import Recipe, from_toml, to_toml

DOCS = Path(__file__).parents[2] / "docs" / "concepts.md"
REAL = {name: from_file(path) for name, path in library().items()}
BUNDLED = {path.relative_to(LIBRARY).as_posix(): from_file(path) for path in LIBRARY.rglob("*.toml")}
FOLDERS = {"safety": "safety", "style": "styles", "object": "objects", "person": "people", "mark": "marks"}
# The least number of entries of a bundled concept, by kind: phrases, erase, counterparts, keep, implicit.
LEAST = {
    "safety": (26, 12, 15, 15, 8),
    "style": (5, 1, 3, 18, 8),
    "object": (5, 1, 2, 18, 8),
    "person": (5, 1, 3, 18, 0),
    "mark": (12, 6, 8, 15, 8),
}
IMAGENETTE = {
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
}
TEMPLATE = (
    'name = "face"\nerase = ["<name>"]\nsynonyms = ["the face of <name>"]\nkeep = ["Bo", "Cy"]\nlabel = "<name>"\n'
)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def names(prompt: str, phrase: str) -> bool:
    """Whether the prompt contains the words of the phrase, in order and without others between them."""
    whole, part = words(prompt), words(phrase)
    return any(whole[start : start + len(part)] == part for start in range(len(whole)))


def faults(concept: Concept) -> list[str]:
    """Faults of a concept file that the schema accepts."""
    result = []
    erased, kept = [phrase.casefold() for phrase in concept.phrases], [phrase.casefold() for phrase in concept.keep]
    result += [f"erased and kept: {phrase}" for phrase in erased if phrase in kept]
    for field in (erased, kept, [prompt.casefold() for prompt in concept.implicit], list(concept.templates)):
        result += [f"twice: {phrase}" for phrase in sorted(set(field)) if field.count(phrase) > 1]
    result += [
        f"named: {prompt}" for prompt in concept.implicit if any(names(prompt, phrase) for phrase in concept.phrases)
    ]
    result += [f"no change: {phrase}" for phrase in concept.phrases if names(concept.goal(phrase), phrase)]
    return result


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_concepts_are_sound_and_named_as_their_file(name: str) -> None:
    concept = BUNDLED[name]
    assert concept.name.lower().replace(" ", "-") == Path(name).stem
    assert faults(concept) == []
    assert concept.anchor in concept.keep


def test_the_faults_of_an_unsound_concept_are_listed() -> None:
    bad = Concept(
        name="x",
        erase=("Red  car", "bus"),
        synonyms=("BUS",),
        anchor="a red car",
        keep=("bus", "bike", "Bike"),
        implicit=("the old red-car parade", "rush hour", "Rush hour", "a busy street"),
        templates=("{}", "{}"),
    )
    assert faults(bad) == [
        "erased and kept: bus",
        "erased and kept: bus",
        "twice: bus",
        "twice: bike",
        "twice: rush hour",
        "twice: {}",
        "named: the old red-car parade",
        "no change: Red  car",
    ]


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_concepts_have_enough_of_everything(name: str) -> None:
    concept = REAL[name]
    least = LEAST[concept.kind]
    has = (
        len(concept.phrases),
        len(concept.erase),
        len(concept.counterparts),
        len(concept.keep),
        len(concept.implicit),
    )
    assert all(there >= wanted for there, wanted in zip(has, least, strict=True)), (has, least)
    assert library()[name].parent.name == FOLDERS[concept.kind]
    assert concept.sources
    assert len(concept.notes.split()) >= 20


def test_the_library_holds_the_families_the_styles_and_the_imagenette_classes() -> None:
    def of(kind: str) -> set[str]:
        return {name for name, concept in REAL.items() if concept.kind == kind}

    assert of("safety") == {"nudity", "violence", "hate", "self-harm", "shocking", "illegal"}
    assert of("style") == {"van-gogh", "kelly-mckernan", "thomas-kinkade", "kilian-eng", "tyler-edlin"}
    assert {REAL[name].label for name in of("object")} == IMAGENETTE
    assert (of("person"), of("mark")) == ({"celebrity"}, {"watermark"})
    for name in of("object"):
        assert set(REAL[name].keep) >= IMAGENETTE - {REAL[name].label}
    for name in of("style"):
        assert set(REAL[name].keep) >= {REAL[other].label for other in of("style") - {name}}


def test_no_two_bundled_files_share_a_name() -> None:
    stems = [path.stem for path in LIBRARY.glob("*/*.toml")]
    assert sorted(stems) == sorted(library())


def test_a_world_has_its_own_meaning_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, anchor in (("objects/church.toml", "castle"), ("worlds/tiny/church.toml", "house")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f'name = "church"\nerase = ["church"]\nanchor = "{anchor}"\n')
    monkeypatch.setattr(concept_module, "LIBRARY", tmp_path)
    assert worlds() == ["tiny"]
    assert (find("church").anchor, find("church", "tiny").anchor) == ("castle", "house")
    (tmp_path / "objects" / "church.toml").unlink()
    assert find("church") == from_phrase("church")


@pytest.mark.parametrize("name", sorted(REAL))
def test_the_documentation_lists_every_concept_as_it_is(name: str) -> None:
    concept = REAL[name]
    numbers = (len(concept.phrases), len(concept.counterparts), len(concept.keep), len(concept.implicit))
    row = f"| `{name}` | {concept.kind} | {concept.anchor} | {' | '.join(map(str, numbers))} |"
    assert row in DOCS.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("shape", sorted(world.SHAPES))
def test_every_shape_has_a_file_with_all_its_names(shape: str) -> None:
    concept = find(shape, "glyphs")
    assert (*concept.erase, *concept.synonyms) == world.names(shape)
    assert concept.implicit == world.implicit_captions(shape)
    assert {word for other in world.SHAPES if other != shape for word in world.names(other)} == set(concept.keep)
    assert concept.anchor in concept.keep


def test_a_bare_word_gets_templates() -> None:
    concept = find("umbrella")
    assert concept.erase == ("umbrella",)
    assert ("a photo of an umbrella", "a photo of an umbrella", "a photo of an ") in concept.prompts(concept.erase)
    assert "a photo of a hat" in [prompt.text for prompt in concept.prompts(["hat"])]


def test_articles_and_where_the_phrase_begins_and_ends() -> None:
    concept = Concept(
        name="x", erase=("x",), templates=("a banana {} on an {}".replace("an {}", "a wall"), "an {} here")
    )
    assert concept.prompts(["arrow", "star"]) == [
        ("a banana arrow on a wall", "a banana arrow", "a banana "),
        ("an arrow here", "an arrow", "an "),
        ("a banana star on a wall", "a banana star", "a banana "),
        ("a star here", "a star", "a "),
    ]


def test_no_bundled_prompt_has_two_articles() -> None:
    for concept in REAL.values():
        goals = [concept.goal(phrase) for phrase in concept.phrases]
        for prompt in concept.prompts([*concept.phrases, *goals, *concept.keep]):
            assert not re.search(r"\b(an?|the) (an?|the)\b", prompt.text), prompt.text


def test_goal_is_the_counterpart_or_the_anchor_or_nothing() -> None:
    concept = Concept.model_validate(
        {"name": "x", "erase": ["a red car"], "synonyms": ["a bus"], "anchor": "y", "counterparts": {"a bus": "a tram"}}
    )
    assert (concept.goal("a bus"), concept.goal("a red car")) == ("a tram", "y")
    assert Concept(name="x", erase=("x",)).goal("x") == ""
    assert find("nudity").goal("a naked woman") == "a woman wearing clothes"


def test_counterparts_come_back_from_a_resolved_recipe() -> None:
    recipe = Recipe.model_validate({"model": "m", "erase": ["nudity"], "concept": [find("nudity")]})
    assert from_toml(to_toml(recipe)).concepts == recipe.concepts
    assert recipe.concepts[0].counterparts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\nerase = ["x"]\nancor = "y"', "did you mean 'anchor'"),
        ('name = "x"', "erase"),
        ('name = "x"\nerase = []', "erase"),
        ('name = "x"\nerase = [""]', "erase"),
        ('name = "x"\nerase = ["x"]\ntemplates = ["a thing"]', "templates: the template 'a thing' needs one {}"),
        ('name = "x"\nerase = ["x"]\nkind = "objects"', "kind"),
        ('name = "x"\nerase = ["x"]\nsources = "a paper"', "sources"),
        (
            'name = "x"\nerase = ["a red car"]\nsynonyms = ["bus"]\n[counterparts]\n"a red cart" = "y"',
            "counterparts: 'a red cart' is neither in erase nor in synonyms; did you mean 'a red car'",
        ),
        ('name = "x"\nerase = ["x"]\n[counterparts]\nx = ""', "counterparts"),
        ('name = "x"\nerase = ["x"]\ncounterparts = "y"', "counterparts"),
        ('name = "x', "Unterminated"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ErasecError) as caught:
        find(str(tmp_path / "bad.toml"))
    assert message in str(caught.value)
    assert "bad.toml" in caught.value.where


def test_a_missing_file_and_an_empty_word_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="cannot be read"):
        find(str(tmp_path / "none.toml"))
    with pytest.raises(ErasecError, match="no name"):
        find(" ")


def test_the_value_replaces_every_placeholder() -> None:
    concept = find('Celebrity: Ada "Lä" Example ')
    assert concept.name == "celebrity-ada-lä-example"
    assert (concept.erase, concept.label) == (('Ada "Lä" Example',), 'Ada "Lä" Example')
    assert concept.goal('Ada "Lä" Example\'s face') == "a person's face"
    assert concept.goal('Ada "Lä" Example') == "a person"
    assert PLACEHOLDER not in concept.model_dump_json()
    assert PLACEHOLDER in REAL["celebrity"].model_dump_json()
    assert concept.keep == REAL["celebrity"].keep


def test_a_person_to_erase_is_removed_from_keep() -> None:
    assert set(REAL["celebrity"].keep) - set(find("celebrity:marie curie").keep) == {"Marie Curie"}


def test_a_file_of_ones_own_may_hold_placeholders(tmp_path: Path) -> None:
    (tmp_path / "face.toml").write_text(TEMPLATE)
    concept = find(f"{tmp_path / 'face.toml'}:Bo")
    assert concept == Concept(name="face-bo", erase=("Bo",), synonyms=("the face of Bo",), keep=("Cy",), label="Bo")


@pytest.mark.parametrize("value", ["", ":", ": ", ":?!"])
def test_a_placeholder_without_a_value_says_how(tmp_path: Path, value: str) -> None:
    (tmp_path / "face.toml").write_text(TEMPLATE)
    for name in ("celebrity", str(tmp_path / "face.toml")):
        with pytest.raises(ErasecError, match="needs a value") as caught:
            find(name + value)
        assert f'--erase "{name}:Ada Example"' in caught.value.fix
        assert caught.value.where.endswith(".toml")


def test_a_value_that_the_concept_does_not_take_is_an_error() -> None:
    with pytest.raises(ErasecError, match="'nudity' takes no value, and was given 'Ada'") as caught:
        find("nudity:Ada")
    assert caught.value.fix == "--erase nudity"


def test_a_colon_in_a_bare_phrase_is_part_of_it() -> None:
    assert find("Ajin: Demi Human").erase == ("Ajin: Demi Human",)


def test_concepts_are_frozen_and_hash() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Concept(name="x", erase=("x",)).name = "y"  # type: ignore[misc]
    assert len({find("nudity"), find("nudity"), find("hate")}) == 2


JUDGES = """
name = "it"
erase = ["it"]

[judge]
nudenet = {classes = ["FACE_MALE", "FACE_FEMALE"], at = 0.5}
clip = {}
"""


def test_the_judge_table_keeps_its_order_and_comes_back_from_a_resolved_recipe(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text(JUDGES)
    concept = from_file(path)
    assert concept.judges == {"nudenet": {"classes": ("FACE_MALE", "FACE_FEMALE"), "at": 0.5}, "clip": {}}
    assert [*concept.judges] == ["nudenet", "clip"]
    assert hash(concept) == hash(from_file(path))
    recipe = Recipe.model_validate({"model": "glyphs", "erase": ["it"], "concept": [concept]})
    assert from_toml(to_toml(recipe)).concepts == (concept,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("judge = 3", "write a table of judges"),
        ("judge = {nudenet = 0.45}", "'nudenet' needs a table of options"),
        ('judge = ["nudenet"]', "'nudenet' needs a table of options"),
        ("judge = {nudenet = {at = [1, 2]}}", "judge."),
        ("judge = {nudenet = {at = {least = 1}}}", "judge."),
        ('judge = [["clip", []], ["clip", []]]', "a judge is named twice"),
    ],
)
def test_a_judge_table_that_is_none_is_an_error(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "it.toml"
    path.write_text(f'name = "it"\nerase = ["it"]\n{table}\n')
    with pytest.raises(ErasecError) as caught:
        from_file(path)
    assert message in caught.value.why
