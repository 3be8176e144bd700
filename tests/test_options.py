"""Options: wrong values are refused with the range, old names still work, and a class that erasec cannot use is refused
with the line to write."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from erasec import options as options_module
from erasec.base import Artifact, Context, Pass, Target
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.family import Site
from erasec.model.edit import Edit
from erasec.model.view import Model
from erasec.options import check_class, configure, options, ranges
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

REQUIRED = ("name", "summary")


def declared() -> type:
    class Declared:
        """Options of every type."""

        strength: Annotated[float, Field(gt=0)] = 1.0
        fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
        steps: Annotated[int, Field(ge=1, le=1000)] = 30
        mode: Literal["fast", "exact"] = "fast"
        batch: str = "1"
        deep: bool = False

        name: ClassVar[str] = "mine"
        renamed: ClassVar[Mapping[str, str]] = {"path": "steps", "part": "fraction"}

    return Declared


Checked: Any = options(declared())
Plain: Any = dataclass(frozen=True)(declared())


WRONG = [
    ({"strength": 0.0}, "strength is 0.0", "a number, above 0; by default 1.0"),
    ({"strength": "much"}, "strength is 'much'", "a number, above 0"),
    ({"strength": float("nan")}, "strength is nan", "a number"),
    ({"strength": float("inf")}, "strength is inf", "a number"),
    ({"strength": True}, "strength is True", "a number"),
    ({"fraction": 1.0}, "fraction is 1.0", "a number, at least 0, below 1; by default 0.5"),
    ({"fraction": -0.1}, "fraction is -0.1", "at least 0, below 1"),
    ({"steps": 0}, "steps is 0", "a whole number, at least 1, at most 1000; by default 30"),
    ({"steps": 1001}, "steps is 1001", "at most 1000"),
    ({"steps": 2.5}, "steps is 2.5", "a whole number"),
    ({"steps": True}, "steps is True", "a whole number"),
    ({"steps": "ten"}, "steps is 'ten'", "a whole number"),
    ({"mode": "fsat"}, "mode is 'fsat'", "did you mean 'fast'?"),
    ({"mode": "zzz"}, "mode is 'zzz'", "exact, fast"),
    ({"batch": True}, "batch is True", "text"),
    ({"deep": 1}, "deep is 1", "true or false; by default False"),
    ({"deep": "true"}, "deep is 'true'", "true or false"),
]


@pytest.mark.parametrize(("values", "what", "why"), WRONG)
@pytest.mark.parametrize("kind", [Checked, Plain])
def test_configure_refuses_wrong_values(kind: type, values: dict[str, Any], what: str, why: str) -> None:
    with pytest.raises(ErasecError) as caught:
        configure(kind, values, "the pass mine")
    assert caught.value.what == f"the pass mine: option {what}"
    assert why in caught.value.why


@pytest.mark.parametrize(("values", "what", "why"), WRONG)
def test_direct_construction_refuses_wrong_values(values: dict[str, Any], what: str, why: str) -> None:
    with pytest.raises(ErasecError) as caught:
        Checked(**values)
    assert caught.value.what == f"mine: option {what}"
    assert why in caught.value.why
    assert asdict(Plain(**values)) == {**asdict(Plain()), **values} or "nan" in what  # a plain class checks nothing


@pytest.mark.parametrize("kind", [Checked, Plain])
def test_right_values_are_taken(kind: Any) -> None:
    values = {"strength": 0.5, "fraction": 0.0, "steps": 1000, "mode": "exact", "batch": "1,4", "deep": True}
    assert configure(kind, values, "the pass mine") == kind(**values)
    assert asdict(kind(**values)) == values
    assert configure(kind, {}, "the pass mine") == kind()
    # A whole number is a number, and a command line reads the text "4" as a number.
    assert configure(kind, {"strength": 2, "batch": 4}, "the pass mine") == kind(strength=2.0, batch="4")
    with pytest.raises(AttributeError):
        kind().steps = 1


@pytest.mark.parametrize("kind", [Checked, Plain])
def test_unknown_options_are_refused_with_the_nearest_name(kind: type) -> None:
    with pytest.raises(ErasecError, match="the pass mine has no option 'strenght'") as caught:
        configure(kind, {"strenght": 1.0}, "the pass mine")
    assert caught.value.why == "did you mean 'strength'?"


def test_direct_construction_refuses_unknown_options() -> None:
    with pytest.raises(ErasecError, match="mine has no option 'strenght'") as caught:
        Checked(strenght=1.0)  # type: ignore[call-arg]
    assert caught.value.why == "did you mean 'strength'?"


def test_a_class_without_options_says_so() -> None:
    @options
    class Empty:
        name: ClassVar[str] = "empty"

    assert configure(Empty, {}, "the pass empty") == Empty()
    with pytest.raises(ErasecError, match="the pass empty has no option 'x'") as caught:
        configure(Empty, {"x": 1}, "the pass empty")
    assert caught.value.why == "it has no options"


@pytest.fixture
def fresh_notes() -> None:
    """Notes on old names are printed once per process: forget which ones were."""
    options_module.say_renamed.cache_clear()


@pytest.mark.usefixtures("fresh_notes")
@pytest.mark.parametrize("kind", [Checked, Plain])
def test_old_names_work_with_one_line_on_stderr(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert configure(kind, {"path": 12}, "the pass mine") == kind(steps=12)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "the pass mine: the option path is now called steps" in printed.err
    assert configure(kind, {"part": 0.25, "steps": 3}, "the pass mine") == kind(fraction=0.25, steps=3)
    assert capsys.readouterr().err.count("\n") == 1
    configure(kind, {"steps": 12}, "the pass mine")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("fresh_notes")
def test_an_old_name_has_the_range_of_the_present_one() -> None:
    with pytest.raises(ErasecError, match="the pass mine: option steps is 0"):
        configure(Checked, {"path": 0}, "the pass mine")


@pytest.mark.usefixtures("fresh_notes")
@pytest.mark.parametrize("values", [{"path": 12, "steps": 13}, {"steps": 13, "path": 12}])
def test_an_option_given_by_both_names_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ErasecError, match="the option steps is given twice"):
        configure(Checked, values, "the pass mine")


@pytest.mark.parametrize("kind", [Checked, Plain])
def test_ranges_are_as_short_as_a_list_shows_them(kind: type) -> None:
    assert ranges(kind) == {
        "strength": "> 0",
        "fraction": ">= 0, < 1",
        "steps": ">= 1, <= 1000",
        "mode": "fast|exact",
        "batch": "",
        "deep": "",
    }


class Whole(Pass):
    """What every pass below has, so that each lacks or adds one thing."""

    paper: ClassVar[str] = "none"

    def sites(self, model: Model) -> tuple[Site, ...]:
        return ()

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        raise NotImplementedError


@options
class Right(Whole):
    strength: Annotated[float, Field(gt=0)] = 1.0
    mode: Literal["fast", "exact"] = "fast"
    batch: str = "1"
    deep: bool = False

    name: ClassVar[str] = "right"
    summary: ClassVar[str] = "does nothing"


@dataclass(frozen=True)
class RightAndPlain(Whole):
    strength: float = 1.0

    name: ClassVar[str] = "right"
    summary: ClassVar[str] = "does nothing"


@options
class RightTarget(Target):
    name: ClassVar[str] = "right"
    summary: ClassVar[str] = "writes nothing"

    def export(self, checkpoint: Folder, out: Any, context: Context) -> Artifact:
        return Artifact(self.name, out)


@options
class NoName(Whole):
    summary: ClassVar[str] = "does nothing"


@options
class NoSummary(Whole):
    name: ClassVar[str] = "wrong"


@options
class NameIsAnOption(Whole):
    name: str = "wrong"  # type: ignore[misc]

    summary: ClassVar[str] = "does nothing"


@dataclass(frozen=True)
class PlainNameIsAnOption(Whole):
    name: str = "wrong"  # type: ignore[misc]

    summary: ClassVar[str] = "does nothing"


class NoDecorator(Whole):
    strength: float = 1.0

    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "does nothing"


class NoDecoratorOfItsOwn(Right):
    """Its base class is decorated, so it is a dataclass, but its own field is no option."""

    more: float = 2.0

    name: ClassVar[str] = "wrong"


@options
class NoDefault(Whole):
    strength: Annotated[float, Field(gt=0)]

    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "does nothing"


@options
class DefaultIsATuple(Whole):
    sizes: tuple[int, ...] = (1, 2)

    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "does nothing"


@options
class NoSolve(Pass):
    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "does nothing"
    paper: ClassVar[str] = "none"

    def sites(self, model: Model) -> tuple[Site, ...]:
        return ()


@options
class NoExport(Target):
    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = "writes nothing"


class RightJudge:
    """Neither judges nor runtimes have options, so they are no dataclasses."""

    name: ClassVar[str] = "right"
    summary: ClassVar[str] = "sees nothing"


class NoSees(RightJudge):
    __abstractmethods__ = frozenset(("sees",))

    @abstractmethod
    def sees(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "label"),
    [(Right, "pass"), (RightAndPlain, "pass"), (Uce, "pass"), (RightTarget, "target"), (RightJudge, "judge")],
)
def test_classes_without_fault_pass(kind: type, label: str) -> None:
    check_class(kind, REQUIRED, label)


@pytest.mark.parametrize(
    ("kind", "label", "what", "fix"),
    [
        (NoName, "pass", "the pass NoName has no name", 'name: ClassVar[str] = "..."'),
        (NoSummary, "pass", "the pass NoSummary has no summary", 'summary: ClassVar[str] = "..."'),
        (NameIsAnOption, "pass", "would have an option name", "name: ClassVar[str] = 'wrong'"),
        (PlainNameIsAnOption, "pass", "would have an option name", "name: ClassVar[str] = 'wrong'"),
        (NoDecorator, "pass", "the pass NoDecorator is not a dataclass", "   @options   "),
        (NoDecoratorOfItsOwn, "pass", "has a field more that is not an option", "   @options   "),
        (NoDefault, "pass", "the option strength has no default", "strength: Annotated[float, Field(gt=0)] = "),
        (DefaultIsATuple, "pass", "the option sizes has a default of the type tuple", 'sizes: str = "1,2"'),
        (NoSolve, "pass", "the pass NoSolve does not define solve", "def solve(self, model, concept, context)"),
        (
            NoExport,
            "target",
            "the target NoExport does not define export",
            "def export(self, checkpoint, out, context)",
        ),
        (NoSees, "judge", "the judge NoSees does not define sees", "def sees(self)"),
    ],
)
def test_a_class_with_a_fault_is_refused_with_the_line_to_write(kind: type, label: str, what: str, fix: str) -> None:
    with pytest.raises(ErasecError) as caught:
        check_class(kind, REQUIRED, label)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where == f"{__name__}.{kind.__name__}"
    assert caught.value.why
