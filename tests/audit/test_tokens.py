"""Prompts as tokens: places for free tokens, what can be typed, gradients to rows, and the simplex."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.audit.subject import Subject
from erasec.audit.tokens import Words, cycled, draw_words, project_simplex, sensitive_words, typed_tokens
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.loading import load
from erasec.recipe.concept import Concept


@pytest.fixture(scope="module")
def subject(random_folder: Path) -> Subject:
    return Subject("model", load(str(random_folder)), Context())


@pytest.fixture(scope="module")
def words(subject: Subject) -> Words:
    return Words(subject)


def bisected(row: torch.Tensor) -> torch.Tensor:
    """The projection onto the simplex by bisection of the shift."""
    low, high = row.min() - 1, row.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (row - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (row - low).clamp(min=0)


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    rng = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 100.0):
        rows = scale * torch.randn(6, 5000, generator=rng)
        projected = project_simplex(rows)
        assert float(projected.min()) >= 0
        assert torch.allclose(projected.sum(1), torch.ones(6), atol=1e-4)
        expected = torch.stack([bisected(row.double()) for row in rows]).float()
        assert torch.allclose(projected, expected, atol=1e-5)
    inside = torch.softmax(torch.randn(3, 20, generator=rng), 1)
    assert torch.allclose(project_simplex(inside), inside, atol=1e-6)


def test_what_can_be_typed_is_tokenised_as_itself_in_any_order(words: Words) -> None:
    tokenizer = words.tokenizer
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert not special & set(words.allowed.tolist())
    rng = torch.Generator().manual_seed(1)
    layout = words.layout([[None] * 12] * 50)
    chosen = words.allowed[torch.randint(len(words.allowed), (len(layout),), generator=rng)]
    assert words.retokenised(layout.filled(chosen)) == 1.0
    # "star" letter by letter, which typed is one token.
    parts = tokenizer.convert_tokens_to_ids(["s", "t", "a", "r</w>"])
    assert words.retokenised(words.layout([[*parts, None]]).filled(words.allowed[:1])) == 0.0


def test_barred_words_are_no_part_of_any_token(words: Words) -> None:
    assert not any("star" in words.tokenizer.decode([int(n)]) for n in typed_tokens(words.tokenizer, ["STAR"]))
    assert any("star" in words.tokenizer.decode([int(n)]) for n in words.allowed)
    short = {words.tokenizer.decode([int(n)]) for n in typed_tokens(words.tokenizer, ["a"])}  # only the word itself
    assert "a" not in short
    assert "star" in short
    with pytest.raises(ErasecError, match="no token"):
        typed_tokens(words.tokenizer, [words.tokenizer.decode([int(n)]) for n in words.allowed])


def test_sensitive_words_are_those_of_all_names() -> None:
    concept = Concept(name="star", erase=("Star of the sea",), synonyms=("five-pointed spark",))
    assert sensitive_words(concept) == ["five", "pointed", "sea", "spark", "star"]


def test_prefixed_prompts_keep_their_own_tokens(words: Words) -> None:
    prompts = ["a red star", "a photo of a five-pointed spark"]
    layout = words.prefixed(prompts, 3)
    plain = words.ids(prompts)
    assert torch.equal(layout.ids[:, 4:], plain[:, 1:-3])
    assert layout.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.columns.tolist() == [1, 2, 3, 1, 2, 3]
    filled = layout.filled(words.allowed[:6])
    assert torch.equal(words.ids(words.texts(filled)), filled)


def test_a_prompt_that_is_too_long_is_cut_at_its_end(words: Words) -> None:
    layout = words.prefixed([" ".join(["star"] * 100)], 2)
    assert layout.ids.shape == (1, 77)
    assert layout.ids[0, -1] == words.tokenizer.eos_token_id
    assert len(layout) == 2
    with pytest.raises(ErasecError, match="no room"):
        words.layout([[5] * 75 + [None]])


def test_interleaved_places_stand_behind_whole_words(words: Words) -> None:
    layout = words.interleaved(["a photo of a red star", "star", "strangeness of it all"], 3)
    tokenizer = words.tokenizer
    for row in range(3):
        columns = layout.columns[layout.rows == row].tolist()
        assert columns
        before = tokenizer.convert_ids_to_tokens([int(layout.ids[row, column - 1]) for column in columns])
        assert all(name.endswith("</w>") for name in before)
    assert layout.columns[layout.rows == 0].tolist() == [4, 8]
    assert layout.columns[layout.rows == 1].tolist() == [2]
    assert words.retokenised(layout.filled(words.allowed[: len(layout)])) == 1.0


def test_states_are_those_of_the_pipeline_and_gradients_reach_the_rows_alone(subject: Subject, words: Words) -> None:
    prompts = ["green a star", "blue a ring"]
    assert torch.equal(words.encode(prompts), subject.states(prompts))
    layout = words.prefixed(["a star", "a ring"], 1)
    chosen = torch.tensor([words.tokenizer(text, add_special_tokens=False).input_ids[0] for text in ("green", "blue")])
    free = words.table[chosen].clone().requires_grad_(True)
    states = words.states(layout.ids, layout, free)
    assert torch.allclose(states, subject.states(prompts), atol=1e-5)
    states.pow(2).sum().backward()
    assert free.grad is not None
    assert float(free.grad.abs().min(1).values.max()) > 0
    assert all(weight.grad is None for weight in words.encoder.parameters())
    assert torch.equal(words.encode(prompts), subject.states(prompts))  # the hook is gone


def test_pooled_output_is_that_of_the_whole_prompt(words: Words) -> None:
    ids = words.ids(["a star", "a photo of a red star on black"])
    assert torch.allclose(words.pooled(ids), words.encoder(ids).pooler_output, atol=1e-5)


def test_random_words_repeat_by_seed(words: Words) -> None:
    drawn = [draw_words(words.tokenizer, words.allowed, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0].split()) == 4


def test_texts_are_taken_in_turn() -> None:
    assert cycled(["a", "b", "c"], 5) == ["a", "b", "c", "a", "b"]
