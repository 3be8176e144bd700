"""Row tables: which token states they take, counterparts, conflicts between concepts, and the prior."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.closed_form import priors
from erasec.closed_form import solver as closed_form
from erasec.closed_form.base import EMPTY, SELECTORS, goals, pairs, spans
from erasec.errors import ErasecError
from erasec.model import view as models
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

STAR = Concept(
    name="star", erase=("star", "five-pointed spark"), anchor="circle", keep=("square", "ring"),
    counterparts=(("five-pointed spark", "round dot"),), templates=("{}", "a {} on navy"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return models.load(str(random_folder))


def words(model: Model, text: str) -> list[str]:
    tokenizer = model._texts.tokenizer("text_encoder")
    return [tokenizer.decode([token]).strip() for token in tokenizer(text).input_ids]


def test_places_are_those_of_the_phrase_in_its_template(model: Model) -> None:
    prompts = STAR.prompts(STAR.phrases)
    found = spans(model, prompts, "context")[0]
    for row, prompt in enumerate(prompts):
        tokens = words(model, prompt.text)
        first, last = found.first[row], found.last[row]
        phrase = "star" if row < 2 else "five-pointed spark"
        spelled = "".join(tokens[first : last + 1])
        assert spelled == phrase.replace(" ", "")
        assert found.end[row] == len(tokens) - 1


def test_each_selector_takes_its_rows(model: Model) -> None:
    prompt, goal = STAR.prompts(["star"])[1:], STAR.prompts(["circle"])[1:]
    states, becomes = (model.encode([p[0].text]).states[0] for p in (prompt, goal))
    found = {name: pairs(model, prompt, goal, name, "context") for name in SELECTORS}
    place = int(model.last_tokens([prompt[0].upto])[0])
    end = int(model.last_tokens([prompt[0].text])[0]) + 1
    assert torch.equal(found["last"][0], states[place : place + 1])
    assert torch.equal(found["tail"][0], states[place:])
    assert torch.equal(found["all"][1], becomes)
    assert torch.equal(found["eot"][0], states[end : end + 1])
    assert torch.equal(found["words"][0], states[place : place + 1])
    assert torch.equal(found["context"][0], torch.cat([states[:place], states[place + 1 :]]))


def test_the_empty_prompt_stands_at_its_first_end_token(model: Model) -> None:
    _, becomes = pairs(model, STAR.prompts(["star"]), [EMPTY, EMPTY], "last", "context")
    empty = model.encode([""]).states[0]
    assert all(torch.equal(row, empty[1]) for row in becomes)
    assert not torch.equal(empty[0], empty[1])


def test_counterparts_take_the_place_of_the_anchor(model: Model) -> None:
    texts = [prompt.text for prompt in goals(STAR, STAR.phrases)]
    assert texts == ["circle", "a circle on navy", "round dot", "a round dot on navy"]
    bare = STAR.model_copy(update={"anchor": "", "counterparts": ()})
    assert goals(bare, ["star"]) == [EMPTY, EMPTY]


def test_what_one_concept_erases_another_does_not_keep(model: Model) -> None:
    circle = Concept(name="circle", erase=("Circle",), anchor="square", keep=("ring",))
    star = STAR.model_copy(update={"keep": ("circle", "ring")})
    edit = next(Uce().solve_all(model, [star, circle], Context()))
    assert edit.asked["star"]["keep"] == ["ring"]
    assert Uce().solve(model, star, Context()).asked["star"]["keep"] == ["circle", "ring"]


def test_concepts_are_solved_together_in_any_order(model: Model) -> None:
    heart = Concept(name="heart", erase=("heart",), anchor="box", keep=("ring",))
    one, other = (next(Uce().solve_all(model, order, Context())) for order in ([STAR, heart], [heart, STAR]))
    assert one.concept == other.concept == "heart, star"
    for site in one.deltas:
        weight = model.stored(site)
        assert torch.equal(one.deltas[site].change(weight), other.deltas[site].change(weight))
    alone = Uce().solve(model.with_edit(Uce().solve(model, STAR, Context())), heart, Context())
    assert not torch.allclose(alone.deltas[site].change(weight), one.deltas[site].change(weight))


def test_a_concepts_scale_moves_it_nearer_to_its_goal(model: Model) -> None:
    heart = Concept(name="heart", erase=("heart",), anchor="box", keep=("ring",))
    heavy = heart.model_copy(update={"scale": 100.0})
    unit = torch.eye(128, dtype=torch.float64)

    def gap(concept: Concept) -> float:
        edit = next(Uce().solve_all(model, [STAR, concept], Context()))
        rows, becomes = pairs(model, concept.prompts(["heart"]), concept.prompts(["box"]), "tail", "context")
        matrix = unit + next(iter(edit.deltas.values())).change(unit)
        return float((rows.double() @ matrix.T - becomes).norm())

    assert gap(heavy) < 0.5 * gap(heart)


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "some.csv"
    lines = [f'{row},"a photo of a {word}, big"' for row, word in enumerate(("ring", "box", "heart", "arrow") * 20)]
    path.write_text("\n".join(["case_number,prompt", *lines]), encoding="utf-8")
    return path


def test_a_prior_is_the_mean_gram_of_all_states_of_its_captions(model: Model, captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.prior.safetensors"
    assert priors.write(out, model, captions) == 80
    states = model.encode(priors.captions(captions)).states.flatten(0, 1).double()
    rows = priors.read(str(out), model, "context")
    assert torch.allclose(closed_form.gram(rows), states.T @ states / len(states), atol=1e-9)
    assert len(rows) <= 128


def test_a_prior_keeps_its_captions_still(model: Model, captions: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "some.prior.safetensors")
    priors.write(Path(out), model, captions)
    bare = STAR.model_copy(update={"keep": ()})
    states = model.encode(["a photo of a heart, big"]).states[0].double()
    unit = torch.eye(128, dtype=torch.float64)

    def drift(step: Uce) -> float:
        matrix = unit + next(iter(step.solve(model, bare, Context()).deltas.values())).change(unit)
        return float((states @ matrix.T - states).norm() / states.norm())

    none, some, strong = drift(Uce()), drift(Uce(prior=out)), drift(Uce(prior=out, prior_weight=100.0))
    assert none > some > strong


def test_a_bad_prior_is_an_error_in_words(model: Model, captions: Path, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="there is no prior"):
        Uce(prior=str(tmp_path / "no")).solve(model, STAR, Context())
    out = tmp_path / "glyphs.prior.safetensors"
    priors.write(out, models.load("glyphs"), captions)
    with pytest.raises(ErasecError, match="other text encoders"):
        Uce(prior=str(out)).solve(model, STAR, Context())
    weights = str(model.source.weight_files("vae")[0])
    with pytest.raises(ErasecError, match="no prior"):
        Uce(prior=weights).solve(model, STAR, Context())
    for name, text, word in (("a.csv", "x,y\n1,2\n", "no column"), ("b.txt", "\n\n", "holds no captions")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ErasecError, match=word):
            priors.captions(tmp_path / name)


def test_a_prior_replaces_nothing_and_says_so_before_it_encodes(
    model: Model, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priors, "build", lambda model, texts: {"context": torch.eye(2)})
    before = captions.read_bytes()
    assert priors.write(tmp_path / "new", model, captions) == 80
    (tmp_path / "shut").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "shut" and may(path, mode))
    monkeypatch.delattr(priors, "build")
    for out, words in (
        (captions, "exists"), (tmp_path / "new", "exists"), (tmp_path, "exists"),
        (tmp_path / "no" / "new", "no folder"), (tmp_path / "shut" / "new", "may not be written"),
    ):  # fmt: skip
        with pytest.raises(ErasecError, match=words):
            priors.write(out, model, captions)
    assert captions.read_bytes() == before
    assert not (tmp_path / "no").exists()


def test_captions_of_spreadsheets_and_damaged_ones(tmp_path: Path) -> None:
    marked, plain = tmp_path / "marked.csv", tmp_path / "marked.txt"
    marked.write_text("caption\na dog\n", encoding="utf-8-sig")
    plain.write_text("a dog\n", encoding="utf-8-sig")
    assert priors.captions(marked) == priors.captions(plain) == ["a dog"]
    long = "a" * (csv.field_size_limit() + 1)
    (tmp_path / "long.csv").write_text(f"caption\n{long}\n")
    with pytest.raises(ErasecError, match="cannot be read") as caught:
        priors.captions(tmp_path / "long.csv")
    assert "field larger" in caught.value.why
