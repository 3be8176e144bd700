"""EIUP: the content of its memories, their effect, and that no weight changes; on glyphs what they suppress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from glyph_passes import tuned
from torch import Tensor

from erasec import registry
from erasec.attention.pipeline import Sampling
from erasec.attention.processors import attach, detach
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.judging.evidence import gather_evidence, rates
from erasec.model import loading
from erasec.model.sidecar import gather_extras, write_extras
from erasec.model.view import Model
from erasec.passes import eiup
from erasec.passes.eiup import Eiup
from erasec.passes.uce import Uce
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training.denoiser import Denoiser

STAR = Concept(name="star", erase=("star",), synonyms=("five-pointed spark",), anchor="circle", keep=("square",))


def predict(denoiser: Denoiser, time: int = 700) -> Tensor:
    """The predictions for a guided batch of two: with the empty prompt, and with a prompt."""
    latents = denoiser.draw([0]).expand(2, -1, -1, -1)
    with torch.no_grad():
        return denoiser.predict(latents, torch.tensor([time, time]), denoiser.states(["", "a red square"]))


def test_keys_and_values_are_the_words_through_the_current_weights(base: Model) -> None:
    """K and V of every token of "star five-pointed spark" as attn2 makes them; published, V = 0 but for the words'."""
    uce = Uce().solve(base, STAR, Context())
    for view in (base, base.with_edit(uce)):
        edit = tuned(Eiup, tokens="words").solve(view, STAR, Context())
        tokens = view.encode(["star five-pointed spark"])
        last = int(tokens.last[0])
        assert last > 2
        for memory in edit.memories:
            k, v = (
                view.weight(next(site for site in view.sites if site.key == f"{memory.attention}.{name}.weight"))
                for name in ("to_k", "to_v")
            )
            assert torch.allclose(memory.keys, (tokens.states[0].double() @ k.T).float(), atol=1e-6)
            own = (tokens.states[0, 1 : last + 1].double() @ v.T).float()
            assert torch.allclose(memory.values[1 : last + 1], own, atol=1e-6)
            assert not bool(memory.values[0].any()) and not bool(memory.values[last + 1 :].any())
    stock = tuned(Eiup, tokens="words").solve(base, STAR, Context()).memories[0]
    assert not torch.allclose(stock.keys, edit.memories[0].keys, atol=1e-4)  # UCE has changed both


def test_every_cross_attention_gets_them_and_no_weight_changes(base: Model) -> None:
    names = {site.key.removesuffix(".to_k.weight") for site in base.select("cross", "k")}
    for tokens, weights in (("words", {-3.0}), ("all", {-3.0, 3.0})):
        edit = tuned(Eiup, weight=-3.0, until=0.6, tokens=tokens).solve(base, STAR, Context())
        assert {memory.attention for memory in edit.memories} == names
        assert len(edit.memories) == len(names) * len(weights)
        assert {memory.weight for memory in edit.memories} == weights
        assert {(memory.mode, memory.until, memory.guided) for memory in edit.memories} == {("side", 0.6, True)}
        assert not edit.deltas
    assert Eiup.extras == {"memory"}


def test_the_words_are_their_columns_in_the_map_of_the_whole_prompt(base: Model) -> None:
    """w M*[:, words] V[words], after the softmax over all of the erasure prompt (step 4 of the published code)."""
    memory = tuned(Eiup, tokens="words").solve(base, STAR, Context()).memories[0]
    every = tuned(Eiup).solve(base, STAR, Context()).memories[0]
    own = slice(1, int(base.encode(["star five-pointed spark"]).last[0]) + 1)
    query = torch.randn(5, memory.keys.shape[1], generator=torch.Generator().manual_seed(0))
    maps = (query @ memory.keys.T).softmax(1)
    assert torch.equal(memory.keys, every.keys)
    assert torch.allclose(maps @ memory.values, maps[:, own] @ every.values[own], atol=1e-6)
    assert not torch.allclose(maps @ memory.values, maps @ every.values, atol=1e-3)


def test_all_tokens_of_the_empty_prompt_take_nothing_away(base: Model) -> None:
    """The prompt less the empty one: the two memories undo each other where both are the same prompt."""
    edit = tuned(Eiup, weight=-4.0).solve(base, STAR, Context())
    gone, back = edit.memories[:2]
    same = [replace(memory, keys=back.keys, values=back.values) for memory in (gone, back)]
    denoiser = Denoiser(base, Context())
    before = predict(denoiser)
    for memories, close in ((same, True), ([gone, back], False)):
        attach(denoiser.unet, memories)
        assert torch.allclose(predict(denoiser), before, atol=1e-5) == close
        detach(denoiser.unet)


def test_with_weight_0_and_after_detaching_everything_is_as_before(base: Model) -> None:
    denoiser = Denoiser(base, Context())
    before = predict(denoiser)
    attach(denoiser.unet, tuned(Eiup, weight=0.0).solve(base, STAR, Context()).memories)
    assert torch.allclose(predict(denoiser), before, atol=1e-6)
    detach(denoiser.unet)
    attach(denoiser.unet, tuned(Eiup, weight=-4.0).solve(base, STAR, Context()).memories)
    after, late = predict(denoiser), predict(denoiser, 100)
    detach(denoiser.unet)
    assert float((after[1] - before[1]).abs().max()) > 1e-3
    assert torch.allclose(after[0], before[0], atol=1e-6)  # the half that no prompt guides
    assert torch.equal(predict(denoiser), before)
    assert torch.allclose(late, predict(denoiser, 100), atol=1e-6)  # beyond the first 0.8 of the schedule


def test_the_erasure_prompt_has_as_many_names_as_fit(base: Model) -> None:
    nudity = concepts.find("nudity")
    names = eiup.fitting_phrases(base, nudity.phrases)
    assert 1 < len(names) < len(nudity.phrases)
    assert names == nudity.phrases[: len(names)]
    room = base.encode([""]).states.shape[1]
    assert room == 77
    last, more = base.last_tokens([" ".join(names), " ".join(nudity.phrases[: len(names) + 1])]).tolist()
    assert last < room - 2 == more  # start and end have a place too, and what is longer is cut
    assert tuned(Eiup).solve(base, nudity, Context()).stats["phrases"] == len(names)
    assert eiup.fitting_phrases(base, STAR.phrases) == STAR.phrases
    assert tuned(Eiup).solve(base, STAR, Context()).stats["phrases"] == 2
    assert tuned(Eiup, words="a square").solve(base, STAR, Context()).stats["phrases"] == 1
    assert eiup.fitting_phrases(base, ["star " * 90, "ring"]) == ("star " * 90,)  # the first in any case


def test_the_option_words_replaces_the_names(base: Model) -> None:
    own, names = tuned(Eiup, words="a square").solve(base, STAR, Context()), tuned(Eiup).solve(base, STAR, Context())
    assert not torch.equal(own.memories[0].keys, names.memories[0].keys)
    assert torch.equal(own.memories[1].keys, names.memories[1].keys)  # the empty prompt's


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": 0.5}, "at most 0"),
        ({"weight": float("nan")}, "at most 0"),
        ({"until": 0.0}, "above 0"),
        ({"until": 1.5}, "at most 1"),
        ({"tokens": "word"}, "did you mean 'words'"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError) as caught:
        tuned(Eiup, **options)
    assert words in caught.value.why


def test_an_erasure_prompt_without_a_token_and_other_families_are_errors(base: Model) -> None:
    with pytest.raises(ErasecError, match="has no token"):
        eiup.text_rows(base, " ", "all")
    with pytest.raises(ErasecError, match="family sd3"):
        tuned(Eiup).sites(replace(base, family=FAMILIES["sd3"]))
    with pytest.raises(ErasecError, match="family sd3"):
        tuned(Eiup).solve(replace(base, family=FAMILIES["sd3"]), STAR, Context())
    assert tuned(Eiup).sites(base) == ()


@pytest.mark.slow
def test_on_glyphs_all_tokens_suppress_what_the_words_alone_do_not(tmp_path: Path) -> None:
    glyphs, star = loading.load("glyphs"), concepts.find("star", "glyphs")
    judge = registry.judge_for(glyphs)
    assert judge is not None
    shares: dict[str, dict[str, float]] = {}
    for tokens in ("words", "all"):
        folder = tmp_path / tokens
        edit = tuned(Eiup, tokens=tokens).solve(glyphs, star, Context())
        glyphs.source.write(folder, {})
        write_extras(folder, gather_extras([edit]))
        evidence = gather_evidence(judge, [star], glyphs.source.root, folder, 8, 0, Sampling(15, 4.0))
        for group in ("name", "implicit", "keep"):
            rows = rates(evidence, group)
            total = sum(row["images"] for row in rows)
            for when in ("before", "after"):
                rate = sum(row[when] * row["images"] for row in rows) / total
                shares.setdefault("none" if when == "before" else tokens, {})[group] = rate
    print(shares)
    assert shares["none"]["name"] > 0.9
    assert shares["all"]["name"] <= 0.5 < shares["words"]["name"]
    assert shares["all"]["keep"] > shares["none"]["keep"] - 0.2
