"""The questions that fit any model."""

from erasec.judging.panel import questions
from erasec.recipe.concept import Concept

OWL = Concept(
    name="owl", erase=("owl",), synonyms=("night bird", "hooter"), keep=("robin", "apple"), implicit=("at night",)
)


def test_each_group_has_as_many_questions_as_images() -> None:
    rows = questions(OWL, 3, seed=1, label="owl")
    groups = [question.group for question in rows]
    assert groups == ["name"] * 3 + ["synonym"] * 3 + ["implicit"] * 3 + ["keep"] * 3
    assert len({question.seed for question in rows}) == 12
    assert all(1_000_003 <= question.seed < 2 * 1_000_003 for question in rows)


def test_concepts_that_keep_the_same_phrase_share_its_pictures() -> None:
    bat = Concept(name="bat", erase=("bat",), keep=("robin", "pear"))
    kept = [{(q.prompt, q.seed) for q in questions(item, 6, 0) if q.group == "keep"} for item in (OWL, bat)]
    shared = {prompt for prompt, _ in kept[0]} & {prompt for prompt, _ in kept[1]}
    assert shared == {prompt for prompt, _ in kept[0] & kept[1]} != set()


def test_phrases_and_templates_alternate() -> None:
    prompts = [question.prompt for question in questions(OWL, 2, 0, "owl")]
    assert prompts == ["owl", "an owl", "night bird", "a hooter", "at night", "at night", "robin", "an apple"]


def test_kept_phrases_have_no_label_and_an_unseen_concept_has_none() -> None:
    assert {question.looked_for for question in questions(OWL, 2, 0, "owl") if question.group == "keep"} == {""}
    assert {question.looked_for for question in questions(OWL, 2, 0)} == {""}


def test_lists_that_are_empty_have_no_questions() -> None:
    assert {question.group for question in questions(Concept(name="x", erase=("x",)), 2, 0)} == {"name"}
