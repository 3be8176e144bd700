"""The judge clip on a small CLIPModel folder, made from glyphs' contrastive pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import clip_folder
import numpy as np
import pytest
import torch

from erasec.errors import ErasecError, MissingTool
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge
from erasec.judges.clip import DEFAULT, REVISION, Clip
from erasec.model.loading import load
from erasec.recipe.concept import Concept, find

SHAPES = tuple(world.SHAPES)


def shape_concept(shape: str) -> Concept:
    others = tuple(other for other in SHAPES if other != shape)
    return Concept(name=shape, erase=(shape,), keep=others, templates=("a {}",), judge=(("clip", ()),))


def judge_of(folder: Path, *concepts: Concept, explicit: bool = True) -> Clip:
    judge = Clip.for_concepts(concepts, {"folder": str(folder)}, explicit)
    assert judge is not None
    return judge


def test_it_sees_each_shape_where_it_is_and_nowhere_else(clip: Path) -> None:
    images, shapes = clip_folder.pictures()
    judge = judge_of(clip, *map(shape_concept, SHAPES))
    for shape in SHAPES:
        assert judge.sees(images, [shape] * len(images)).tolist() == [other == shape for other in shapes]
    assert judge.sees(images, list(shapes)).all()
    assert not judge.sees(images, [*shapes[1:], shapes[0]]).any()
    assert not judge.sees(images, [""] * len(images)).any()


def test_a_concept_that_stands_against_nothing_like_it_is_seen_everywhere(clip: Path) -> None:
    """The control: what stands against a concept decides, so the judge depends on it."""
    images, _ = clip_folder.pictures()
    strict, loose = shape_concept("star"), shape_concept("star").model_copy(update={"keep": ("ring",)})
    seen = [judge_of(clip, concept).sees(images, ["star"] * len(images)).sum() for concept in (strict, loose)]
    assert seen[0] == 1 < seen[1]


def test_agreement_is_the_clip_score_of_a_picture_and_its_own_prompt(clip: Path) -> None:
    """A matching prompt beats a shuffled one for at least 90 % of the pairs; here for all."""
    images, shapes = clip_folder.pictures()
    judge = judge_of(clip, shape_concept("star"))
    prompts = [f"a {shape}" for shape in shapes]
    own = judge.agreement(images, prompts)
    other = judge.agreement(images, [*prompts[1:], prompts[0]])
    assert own == pytest.approx(1, abs=1e-4)
    assert (own > other + 0.05).all()
    assert judge.agreement(images[:1], ["a star " * 200]).shape == (1,)  # cut at the length of the text encoder


def test_texts_are_embedded_as_by_the_pair_of_glyphs(clip: Path) -> None:
    prompts = ["a red star", "a photo of a blue heart"]
    tokens = load("glyphs").encode(prompts)
    with torch.no_grad():
        theirs = GlyphJudge()._pair.texts(tokens.states[torch.arange(2), tokens.last + 1].float()).numpy()
    judge = judge_of(clip, shape_concept("star"))
    assert np.abs(judge._network.texts(prompts) - theirs).max() < 1e-5


def test_the_phrases_are_the_concepts_own_or_those_of_the_row(clip: Path) -> None:
    church = find("church")
    row = judge_of(clip, church).rows["church"]
    assert row.phrases == church.phrases and row.against == (church.anchor, *church.keep[1:])
    assert row.templates == church.templates
    chosen = church.model_copy(update={"judge": (("clip", (("phrases", ("a church",)), ("against", ("a barn",)))),)})
    row = judge_of(clip, chosen).rows["church"]
    assert (row.phrases, row.against) == (("a church",), ("a barn",))


def test_a_concept_with_nothing_to_compare_it_with_is_an_error(clip: Path) -> None:
    with pytest.raises(ErasecError, match="clip cannot see lighthouse") as caught:
        judge_of(clip, Concept(name="lighthouse", erase=("lighthouse",)))
    assert "no anchor and keeps no phrase" in caught.value.why


def test_a_template_without_a_place_for_the_phrase_is_an_error(clip: Path) -> None:
    row = (("templates", ("a photo",)),)
    with pytest.raises(ErasecError, match="the template 'a photo' is no template"):
        judge_of(clip, shape_concept("star").model_copy(update={"judge": (("clip", row),)}))


def test_it_looks_for_unnamed_concepts_only_where_the_user_names_it(clip: Path) -> None:
    concept = Concept(name="lighthouse", erase=("lighthouse",), anchor="a tower")
    assert Clip.for_concepts([concept], {"folder": str(clip)}) is None
    assert judge_of(clip, concept).panel(concept, 1, 0)[0].looked_for == "lighthouse"


def test_the_digest_holds_the_weights_and_the_phrases(clip: Path, tmp_path: Path) -> None:
    star, heart = judge_of(clip, shape_concept("star")), judge_of(clip, shape_concept("heart"))
    other = shutil.copytree(clip, tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = judge_of(other, shape_concept("star"))
    assert len({star.digest, heart.digest, changed.digest}) == 3
    assert star.digest == judge_of(clip, shape_concept("star")).digest
    assert star.title == "clip small-clip, zero-shot top-1 is one of the concept's 1 of 10 phrases"


def test_without_weights_the_error_is_the_command_that_fetches_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = f"hf download {DEFAULT} --revision {REVISION} "
    assert Clip.needs().startswith(command) and "1.7 GB" in Clip.needs()
    with pytest.raises(MissingTool) as caught:
        Clip.for_concepts([find("church")])
    assert caught.value.fix.startswith(command)
    with pytest.raises(MissingTool) as caught:
        Clip.for_concepts([find("church")], explicit=True)
    assert "HF_HUB_OFFLINE" in caught.value.why


def test_nothing_is_fetched_unless_the_user_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("erasec.model.hub.snapshot", lambda *args, **kwargs: asked.append(args))
    with pytest.raises(MissingTool):
        Clip.for_concepts([find("church")])
    assert not asked
    with pytest.raises(MissingTool):  # the pretended hub brings nothing
        Clip.for_concepts([find("church")], explicit=True)
    assert asked[0][:2] == (DEFAULT, REVISION)


def test_the_hubs_cache_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: Path) -> None:
    snapshot = tmp_path / f"models--{DEFAULT.replace('/', '--')}" / "snapshots" / REVISION
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(clip, snapshot.with_name("0" * 40))  # another revision is not the pinned one
    assert Clip.needs()
    shutil.copytree(clip, snapshot)
    assert Clip.needs() == ""
    judge = Clip.for_concepts([find("church")])
    assert judge is not None and f"{DEFAULT} at {REVISION[:8]}" in judge.title


def test_a_folder_of_another_model_is_an_error(clip: Path, tmp_path: Path) -> None:
    other = shutil.copytree(clip, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(ErasecError, match="is no CLIP"):
        judge_of(other, shape_concept("star"))


def test_pickled_weights_are_refused(clip: Path, tmp_path: Path) -> None:
    other = shutil.copytree(clip, tmp_path / "other")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(MissingTool, match="are not in"):
        judge_of(other, shape_concept("star"))


def test_damaged_weights_are_an_error(clip: Path, tmp_path: Path) -> None:
    other = shutil.copytree(clip, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"no tensors")
    images, _ = clip_folder.pictures()
    with pytest.raises(ErasecError, match="cannot be read"):
        judge_of(other, shape_concept("star")).sees(images, ["star"] * len(images))


def test_it_cannot_locate_a_concept(clip: Path) -> None:
    judge = judge_of(clip, shape_concept("star"))
    assert not judge.locates
    with pytest.raises(ErasecError, match="cannot locate"):
        judge.boxes(clip_folder.pictures()[0], "star")
    assert judge.embed(clip_folder.pictures()[0]).shape == (10, 128)


def rates(folder: Path) -> tuple[float, float]:
    """How often the judge sees a shape in held-out renders that show it, and in those that show another one: the means
    over ten shapes."""
    samples = [sample for index in range(1000) if len((sample := world.sample(12345, index)).glyphs) == 1]
    images = np.stack([sample.image for sample in samples])
    truth = np.array([sample.glyphs[0].shape for sample in samples])
    concepts = [find(shape, "glyphs") for shape in SHAPES]
    seen = [judge_of(folder, concept).sees(images, [concept.name] * len(images)) for concept in concepts]
    own = [row[truth == shape].mean() for row, shape in zip(seen, SHAPES, strict=True)]
    others = [row[truth != shape].mean() for row, shape in zip(seen, SHAPES, strict=True)]
    return float(np.mean(own)), float(np.mean(others))


@pytest.mark.slow
def test_a_trained_clip_sees_shapes_in_renders_that_it_never_saw(tmp_path: Path) -> None:
    """A vision tower of two layers, 600 steps: 80 % against the 100 % of judge B, and 2 % false. The control is the
    same model before the training."""
    model = clip_folder.small_clip()
    before = rates(clip_folder.write(model, tmp_path / "before"))
    clip_folder.train(model, 600)
    after = rates(clip_folder.write(model, tmp_path / "after"))
    assert before[0] - before[1] < 0.1
    assert after[0] > 0.7 and after[1] < 0.05
