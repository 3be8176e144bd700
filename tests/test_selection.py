"""Which judge decides about a concept, and which one a pass may consult."""

from __future__ import annotations

from pathlib import Path

import clip_folder
import pytest

from erasec.errors import ErasecError, MissingTool
from erasec.judges import nudenet
from erasec.model import loading
from erasec.model.view import Model
from erasec.recipe.concept import Concept, find
from erasec.selection import no_tuning_judge, select, tuning_judge

NUDITY, CHURCH = find("nudity"), find("church")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a user types for a small CLIP that is not trained."""
    folder = clip_folder.write(clip_folder.small_clip(), tmp_path_factory.mktemp("clip") / "small")
    return f"clip:folder={folder}"


@pytest.fixture
def model(random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Model:
    """A model of no world, on a machine with an empty cache of the hub and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return loading.load(str(random_folder))


@pytest.fixture
def no_nudenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudenet, "weights_file", lambda: None)


def names(model: Model, concept: Concept, *wanted: str) -> list[str]:
    return [judge.name for judge in select(model, [concept], wanted).by_concept[concept.name]]


def test_the_first_judge_of_the_table_that_is_here_decides(model: Model) -> None:
    chosen = select(model, [NUDITY, CHURCH])
    assert [judge.name for judge in chosen.by_concept["nudity"]] == ["nudenet"]  # and no clip, which is not here
    assert chosen.by_concept["church"] == () and chosen.of_model is None
    (remark,) = chosen.remarks
    assert remark.startswith("church could be judged by classifier: hf download microsoft/resnet-50 --revision ")
    assert "; or by clip: hf download openai/clip-vit-large-patch14 " in remark


@pytest.mark.usefixtures("no_nudenet")
def test_what_is_missing_is_named_with_the_pip_line(model: Model) -> None:
    chosen = select(model, [NUDITY])
    assert chosen.by_concept["nudity"] == ()
    (remark,) = chosen.remarks
    assert remark.startswith('nudity could be judged by nudenet: pip install "erasec[nudenet]"; or by clip: ')


def test_a_named_judge_goes_first_and_the_others_follow(model: Model, clip: str) -> None:
    assert names(model, NUDITY, clip) == ["clip", "nudenet"]
    assert names(model, NUDITY, "nudenet", clip) == ["nudenet", "clip"]
    assert names(model, CHURCH, clip) == ["clip"]


def test_a_named_judge_takes_options(model: Model) -> None:
    (judge,) = select(model, [NUDITY], ["nudenet:at=0.6,resize=stretched"]).by_concept["nudity"]
    assert "from 0.6, stretched" in judge.title
    with pytest.raises(ErasecError, match="nudenet has no option 'above'"):
        select(model, [NUDITY], ["nudenet:above=0.6"])


def test_a_named_judge_that_can_see_none_of_the_concepts_is_an_error(model: Model) -> None:
    with pytest.raises(ErasecError, match="nudenet cannot see church"):
        select(model, [CHURCH], ["nudenet"])
    assert [judge.name for judge in select(model, [CHURCH, NUDITY], ["nudenet"]).by_concept["nudity"]] == ["nudenet"]


@pytest.mark.usefixtures("no_nudenet")
def test_a_named_judge_that_is_missing_is_an_error(model: Model) -> None:
    with pytest.raises(MissingTool, match="nudenet cannot be used"):
        select(model, [NUDITY], ["nudenet"])


def test_a_table_with_an_unknown_judge_is_named(model: Model) -> None:
    concept = Concept(name="it", erase=("it",), judge=(("nudnet", ()),))
    (remark,) = select(model, [concept]).remarks
    assert remark == "it could be judged by nudnet, which is not registered here (did you mean 'nudenet'?)"


def test_options_of_a_table_that_the_judge_does_not_accept_are_an_error(model: Model) -> None:
    concept = Concept(name="it", erase=("it",), judge=(("nudenet", (("at", 0.5),)),))
    with pytest.raises(ErasecError, match="nudenet cannot see it"):
        select(model, [concept])


def test_in_a_world_its_own_judge_decides(model: Model) -> None:
    glyphs = loading.load("glyphs")
    star = find("star", "glyphs")
    assert names(glyphs, star) == ["glyphs"]
    assert names(glyphs, star, "glyphs") == ["glyphs"]
    assert names(glyphs, NUDITY) == []  # glyphs have no nudity, and nothing else looks for it unless it is named
    assert select(glyphs, [NUDITY]).of_model is not None
    assert names(glyphs, NUDITY, "nudenet") == ["nudenet"]
    assert names(model, star) == []
    with pytest.raises(ErasecError, match="the judge glyphs has no options"):
        select(glyphs, [star], ["glyphs:at=0.6"])


def test_the_judge_that_decides_is_never_consulted_by_a_pass(model: Model, clip: str) -> None:
    """With nudenet alone there is no judge for tuning; with clip, which cannot locate anything, the order matters."""
    assert tuning_judge(model, NUDITY) is None
    assert tuning_judge(model, NUDITY, ["nudenet", clip]) is None
    tuning = tuning_judge(model, NUDITY, [clip])
    assert tuning is not None and tuning.name == "nudenet"
    deciding = select(model, [NUDITY], [clip]).by_concept["nudity"][0]
    assert deciding.name == "clip" and deciding.digest != tuning.digest


def test_an_error_of_a_pass_says_which_judge_to_give(model: Model, clip: str) -> None:
    why = no_tuning_judge(model, NUDITY)
    assert why.startswith("nudenet decides the checks")
    assert why.endswith("another judge has to decide, such as --judge clip")
    assert no_tuning_judge(model, CHURCH, [clip]) == "clip decides the checks, and no judge here can locate church"
    why = no_tuning_judge(model, CHURCH)
    assert why.startswith("no judge can see church in the images of") and "church could be judged by classifier" in why


def test_a_world_has_a_second_judge_for_tuning() -> None:
    glyphs, star = loading.load("glyphs"), find("star", "glyphs")
    tuning, deciding = tuning_judge(glyphs, star), select(glyphs, [star]).by_concept["star"][0]
    assert tuning is not None and tuning.digest != deciding.digest
