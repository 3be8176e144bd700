"""Every bundled concept of real pictures says which judges can see it."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec import registry
from erasec.errors import ErasecError
from erasec.options import configure
from erasec.recipe.concept import Concept, find, from_file, library

IMAGENETTE = {
    "tench": 0,
    "english-springer": 217,
    "cassette-player": 482,
    "chain-saw": 491,
    "church": 497,
    "french-horn": 566,
    "garbage-truck": 569,
    "gas-pump": 571,
    "golf-ball": 574,
    "parachute": 701,
}


def accept(concept: Concept) -> list[str]:
    """The judges of a concept, whose options they have accepted. Raises ErasecError for others."""
    for name, given in concept.judges.items():
        kind = registry.load_judge(name)
        assert kind.row is not None
        kind.look_for(concept, configure(kind.row, given, name))  # type: ignore[attr-defined]
    return [*concept.judges]


@pytest.mark.parametrize("path", library().values(), ids=lambda path: path.stem)
def test_it_names_judges_that_accept_its_options(path: Path) -> None:
    assert accept(from_file(path))


def test_options_that_no_judge_accepts_are_an_error() -> None:
    """The control of the test above."""
    for row in ({"classes": ["FACE"]}, {"classes": ["FACE_MALE"], "at": 2}, {"parts": ["FACE_MALE"]}):
        with pytest.raises(ErasecError):
            accept(Concept(name="it", erase=("it",), judge={"nudenet": row}))  # type: ignore[arg-type]
    with pytest.raises(ErasecError, match="no judge 'nudnet'"):
        accept(Concept(name="it", erase=("it",), judge={"nudnet": {}}))  # type: ignore[arg-type]


def test_objects_have_their_classes_of_imagenet_and_nudity_all_exposed_parts() -> None:
    from erasec.judges.nudenet import CLASSES

    indices = {name: from_file(path).judges.get("classifier", {}).get("index") for name, path in library().items()}
    assert {name: index for name, index in indices.items() if index is not None} == IMAGENETTE
    assert next(iter(find("nudity").judges)) == "nudenet"
    exposed = {name for name in CLASSES if name.endswith("_EXPOSED")}
    assert set(find("nudity").judges["nudenet"]["classes"]) == exposed  # type: ignore[arg-type]
    assert find("nudity").judges["nudenet"]["at"] == 0.45
