"""Rows of text states: where phrases are, which tokens each selector takes, and what they become."""

from __future__ import annotations

import torch
from concepts import STAR

from erasec.closed_form.token_rows import EMPTY, SELECTORS, find_spans, goal_prompts, row_pairs
from erasec.model.view import Model


def words(model: Model, text: str) -> list[str]:
    tokenizer = model._text_encoders.tokenizer("text_encoder")
    return [tokenizer.decode([token]).strip() for token in tokenizer(text).input_ids]


def test_spans_are_those_of_the_phrase_in_its_template(model: Model) -> None:
    prompts = STAR.prompts(STAR.phrases)
    spans = find_spans(model, prompts, "context")[0]
    for row, prompt in enumerate(prompts):
        tokens = words(model, prompt.text)
        first, last = spans.first[row], spans.last[row]
        phrase = "star" if row < 2 else "five-pointed spark"
        spelled = "".join(tokens[first : last + 1])
        assert spelled == phrase.replace(" ", "")
        assert spans.end[row] == len(tokens) - 1


def test_each_selector_takes_its_rows(model: Model) -> None:
    prompt, goal = STAR.prompts(["star"])[1:], STAR.prompts(["circle"])[1:]
    states, goal_states = (model.encode([p[0].text]).states[0] for p in (prompt, goal))
    rows = {name: row_pairs(model, prompt, goal, name, "context") for name in SELECTORS}
    index = int(model.last_tokens([prompt[0].upto])[0])
    end = int(model.last_tokens([prompt[0].text])[0]) + 1
    assert torch.equal(rows["last"][0], states[index : index + 1])
    assert torch.equal(rows["tail"][0], states[index:])
    assert torch.equal(rows["all"][1], goal_states)
    assert torch.equal(rows["eot"][0], states[end : end + 1])
    assert torch.equal(rows["words"][0], states[index : index + 1])
    assert torch.equal(rows["context"][0], torch.cat([states[:index], states[index + 1 :]]))


def test_the_empty_prompt_is_taken_at_its_first_end_token(model: Model) -> None:
    _, becomes = row_pairs(model, STAR.prompts(["star"]), [EMPTY, EMPTY], "last", "context")
    empty = model.encode([""]).states[0]
    assert all(torch.equal(row, empty[1]) for row in becomes)
    assert not torch.equal(empty[0], empty[1])


def test_counterparts_replace_the_anchor(model: Model) -> None:
    texts = [prompt.text for prompt in goal_prompts(STAR, STAR.phrases)]
    assert texts == ["circle", "a circle on navy", "round dot", "a round dot on navy"]
    bare = STAR.model_copy(update={"anchor": "", "counterparts": ()})
    assert goal_prompts(bare, ["star"]) == [EMPTY, EMPTY]
