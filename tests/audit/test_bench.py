"""The bench: selection and scoring use different judges, references and controls are run, and obstacles are stated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from erasec.audit import bench as bench_module
from erasec.audit import store
from erasec.audit.base import Cell, Rate, Reading, digest_of
from erasec.audit.bench import Bench, Settings, stack_choices
from erasec.audit.subject import Pictured
from erasec.base import Attempt, Judge, Probe, Question, Role, Threat
from erasec.errors import ErasecError
from erasec.options import options
from erasec.recipe.concept import Concept

CONCEPT = Concept(name="star", erase=("star",), keep=("circle", "square"))


class Brightness(Judge):
    """Sees the concept in pictures that are brighter than ``least``."""

    name: ClassVar[str] = "brightness"
    summary: ClassVar[str] = "bright pictures"

    def __init__(self, least: int, label: str = "star") -> None:
        self.least, self.label, self.asked = least, label, 0

    @classmethod
    def for_model(cls, model: Any, tuning: bool = False) -> None:
        return None

    @property
    def digest(self) -> str:
        return f"{self.least}"

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        return tuple(
            Question(group, f"{phrase} {number}", number, self.label if group == "name" else "circle")
            for group, phrase in (("name", "a star"), ("keep", "a circle"))
            for number in range(images)
        )

    def sees(self, images: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.bool_]:
        self.asked += len(images)
        seen: NDArray[np.bool_] = images.reshape(len(images), -1).mean(1) > self.least
        return seen

    def agreement(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> None:
        return None


@dataclass
class Lamp(Pictured):
    """Paints pictures of one brightness. It counts how often it is asked."""

    role: str
    level: int
    asked: int = 0

    @property
    def digest(self) -> str:  # type: ignore[override]
        return f"lamp {self.role} {self.level}"

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, scheduler: str = "ddim"
    ) -> NDArray[np.uint8]:
        self.asked += len(prompts)
        return np.full((len(prompts), 2, 2, 3), self.level, np.uint8)


@options
class Plain(Probe):
    """The pictures of the prompts; the control is dark."""

    choices: int = 1

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "plain prompts"
    threat: ClassVar[Threat] = "prompt"
    gradients: ClassVar[bool] = False

    def attack(self, bench: Bench, subject: Any) -> Iterator[Attempt]:
        prompts = bench.prompts("name")
        pictures = subject.pictures(prompts, bench.seeds("plain", len(prompts)), 1, 1.0)
        yield Attempt("named", np.repeat(pictures[:, None], self.choices, 1))

    def control(self, bench: Bench, subject: Any) -> Iterator[Attempt]:
        dark = np.zeros((bench.settings.images, self.choices, 2, 2, 3), np.uint8)
        yield Attempt("named", dark)


def bench(selector: Judge | None = None, **levels: int) -> Bench:
    roles: dict[Role, Pictured] = {role: Lamp(role, level) for role, level in levels.items()}  # type: ignore[misc]
    return Bench(CONCEPT, roles, Brightness(100), selector, Settings(images=20))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))


def test_every_role_has_a_rate_of_its_own() -> None:
    (reading,) = bench(model=0, base=200, twin=10, random=20).measure(Plain())
    assert {role: rate.value for role, rate in reading.rates.items()} == {
        "model": 0.0,
        "control": 0.0,
        "base": 1.0,
        "twin": 0.0,
        "random": 0.0,
    }
    assert reading.rates["model"].count == 20
    assert reading.separates


def test_an_attack_that_the_twin_shows_as_well_does_not_separate() -> None:
    (reading,) = bench(model=200, base=200, twin=200).measure(Plain())
    assert reading.separates is False
    (by_control,) = bench(model=200, base=200).measure(Plain())
    assert (by_control.floor, by_control.separates) == ("control", True)
    assert Reading("p", "v", "prompt", {"model": Rate(1, 2), "control": Rate(0, 2)}).separates is None


def test_the_scorer_never_selects() -> None:
    picky, scorer = Brightness(250), Brightness(100)
    pictures = np.stack([np.full((2, 2, 3), level, np.uint8) for level in (10, 200, 255)])[None]
    made = Bench(CONCEPT, {"model": Lamp("model", 0)}, scorer, picky, Settings(images=1))
    # The scorer would take the second picture; the selector sees only the third.
    assert made.select(pictures)[0].mean() == 255
    assert scorer.asked == 0
    blind = Bench(CONCEPT, {"model": Lamp("model", 0)}, scorer, Brightness(255), Settings(images=1))
    assert blind.select(pictures)[0].mean() == 10  # the first, where the selector sees none


def test_the_success_of_an_attack_is_a_union_with_the_plain_prompts() -> None:
    made = Bench(CONCEPT, {"model": Lamp("model", 0)}, Brightness(100), None, Settings(images=4))
    plain, attacked = (
        np.stack([np.full((2, 2, 3), level, np.uint8) for level in levels])
        for levels in ((200, 0, 0, 0), (0, 200, 200, 0))
    )
    cell = made.score(Attempt.single("words", attacked, plain=plain))
    assert (cell.rate.hits, cell.measured) == (2, {"pre_asr": 0.25, "asr": 0.75})
    assert made.score(Attempt.single("words", attacked)).measured == {}


def test_a_selector_that_cannot_see_the_concept_selects_nothing() -> None:
    made = bench(Brightness(1, label=""), model=200)
    assert made.selector is None
    (reading,) = made.measure(Plain(choices=2))
    assert reading.obstacle


def test_the_selector_looks_for_its_own_label() -> None:
    class Named(Brightness):
        def sees(self, images: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.bool_]:
            assert set(labels) == {"a star"}
            return super().sees(images, labels)

    bench(Named(50, label="a star"), model=200).measure(Plain(choices=2))


def test_a_choice_without_a_selector_is_an_obstacle() -> None:
    (reading,) = bench(model=200).measure(Plain(choices=3))
    assert "second judge" in reading.obstacle or "one judge" in reading.obstacle
    assert not reading.rates
    (chosen,) = bench(Brightness(50), model=200).measure(Plain(choices=3))
    assert chosen.budget == 3
    assert chosen.rates["model"].value == 1.0


def test_a_probe_that_needs_weights_is_not_run_on_a_runtime() -> None:
    class Deep(Plain):
        gradients: ClassVar[bool] = True

    (reading,) = bench(model=200).measure(Deep())
    assert "torch" in reading.obstacle
    assert not reading.rates


def test_an_error_on_the_model_is_an_obstacle_and_one_on_a_reference_leaves_it_out() -> None:
    class Failing(Plain):
        def attack(self, bench: Bench, subject: Any) -> Iterator[Attempt]:
            if subject.role in roles:
                raise ErasecError("no", why="because")
            yield from super().attack(bench, subject)

    roles = {"model"}
    (reading,) = bench(model=200, base=200).measure(Failing())
    assert reading.obstacle == "no: because"
    roles = {"base"}
    (reading,) = bench(model=200, base=200).measure(Failing())
    assert not reading.obstacle
    assert set(reading.rates) == {"model", "control"}
    assert reading.note == "not measured on the base: no: because"


def test_a_second_audit_takes_cells_from_the_cache() -> None:
    first = bench(model=0, base=200)
    first.measure(Plain())
    again = bench(model=0, base=200)
    (reading,) = again.measure(Plain())
    assert reading.rates["base"].value == 1.0
    assert [subject.asked for subject in again.subjects.values()] == [0, 0]  # type: ignore[attr-defined]
    other = bench(model=10, base=200)  # another model: only it is painted
    other.measure(Plain())
    assert [subject.asked for subject in other.subjects.values()] == [20, 0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["code_digest", "versions", "source_digest"])
def test_cells_of_other_code_are_measured_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tried = bench(model=0)
    subject, probe = tried.subjects["model"], Plain()
    key = tried._key(probe, "model", subject)
    assert tried._key(probe, "model", subject) == key
    monkeypatch.setattr(bench_module, name, lambda *_: "another")
    assert tried._key(probe, "model", subject) != key


def test_a_damaged_cell_is_measured_again(tmp_path: Path) -> None:
    cells = [Cell("named", Rate(1, 2), 3, 0.5, {"loss": 1.0}, "note", np.ones((1, 2, 2, 3), np.uint8))]
    store.save("name", cells)
    (stored,) = store.load("name") or []
    assert (stored.variant, stored.rate, stored.budget, dict(stored.measured)) == (
        "named",
        Rate(1, 2),
        3,
        {"loss": 1.0},
    )
    assert stored.shown is not None
    assert stored.shown.shape == (1, 2, 2, 3)
    path = tmp_path / "cache" / "audit" / "name"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert store.load("name") is None
    assert store.load("other") is None


def test_a_row_has_the_digest_of_the_texts_that_were_read() -> None:
    class Read(Plain):
        name: ClassVar[str] = "read"

        def attack(self, bench: Bench, subject: Any) -> Iterator[Attempt]:
            subject.texts.update(dict.fromkeys(bench.prompts("name")))
            (attempt,) = super().attack(bench, subject)
            yield attempt
            yield Attempt("again", attempt.pictures)  # of the same texts

    made = bench(model=200)
    first, second = made.measure(Read())
    assert first.prompts == second.prompts == digest_of(made.prompts("name"))
    (none,) = bench(model=200).measure(Plain(choices=1))
    assert none.prompts == ""


def test_after_the_budget_no_probe_begins_and_none_reads_as_zero() -> None:
    readings = bench(model=0).run([Plain(), Plain(choices=1)], minutes=1e-9)
    assert all("budget" in reading.obstacle and not reading.rates for reading in readings)


def test_seeds_differ_between_purposes_and_repeat_within_one() -> None:
    made = bench(model=0)
    assert made.seeds("a", 3) == made.seeds("a", 5)[:3]
    assert not set(made.seeds("a", 50)) & set(made.seeds("b", 50))


def test_a_judge_that_cannot_see_the_concept_is_refused() -> None:
    with pytest.raises(ErasecError, match="cannot see star"):
        Bench(CONCEPT, {"model": Lamp("model", 0)}, Brightness(1, label=""))


def test_choices_are_stacked_by_prompt() -> None:
    first, second = np.zeros((2, 1, 1, 3), np.uint8), np.ones((2, 1, 1, 3), np.uint8)
    stacked = stack_choices([first, second])
    assert stacked.shape == (2, 2, 1, 1, 3)
    assert stacked[:, 0].max() == 0
    assert stacked[:, 1].min() == 1


def test_the_floor_is_the_twin_else_the_untrained_model_else_the_control() -> None:
    rates = {"model": Rate(1, 2), "random": Rate(0, 2)}
    assert Reading("p", "v", "prompt", rates).floor == "random"  # type: ignore[arg-type]
    assert Reading("p", "v", "prompt", {**rates, "twin": Rate(0, 2)}).floor == "twin"  # type: ignore[arg-type]
    assert Reading("p", "v", "prompt", {"model": Rate(1, 2)}).floor is None
