"""The checks: they pass what is erased and fail what is not, on the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import TEXT_TO_IMAGE

from erasec import registry
from erasec.attention.pipeline import Sampling, generate
from erasec.base import Context, Question
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge
from erasec.graphs.link import write_onnx
from erasec.judging import evidence, validate
from erasec.judging.evidence import Evidence
from erasec.judging.intervals import wilson
from erasec.model import loading
from erasec.passes.uce import Uce
from erasec.recipe import concept
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Limits

SAMPLING = Sampling(steps=10, guidance=4.0)
LIMITS = Limits(images=6, steps=10)


@pytest.fixture(scope="module")
def unedited() -> Evidence:
    """The base against itself: what a build that did nothing would show."""
    base = loading.bundled_folder("glyphs")
    gathered = evidence.gather_evidence(GlyphJudge(), [concept.find("star", "glyphs")], base, base, 6, 0, SAMPLING)
    assert gathered is not None
    return gathered


def by_name(evidence: Evidence, limits: Limits = LIMITS) -> dict[str, bool]:
    return {check.name: check.passed for check in validate.checks(evidence, GlyphJudge(), limits, 0, "DDIM")}


def test_the_unedited_model_fails_erased_and_passes_kept(unedited: Evidence) -> None:
    passed_by_name = by_name(unedited)
    assert not passed_by_name["erased/name"]
    assert not passed_by_name["erased/synonym"]
    assert passed_by_name["kept/hits"]
    assert passed_by_name["kept/colours"]
    assert passed_by_name["kept/agreement"]
    assert np.array_equal(unedited.before, unedited.after)


def test_implicit_is_reported_by_default_and_enforced_with_a_limit(unedited: Evidence) -> None:
    assert by_name(unedited)["erased/implicit"]
    assert not by_name(unedited, Limits(images=6, implicit=0.5))["erased/implicit"]


def test_a_model_that_lost_everything_fails_kept(unedited: Evidence) -> None:
    """Black pictures hold no star, and nothing else either."""
    judge, black = GlyphJudge(), np.zeros_like(unedited.after)
    shapes = [question.looked_for for question in unedited.questions]
    prompts = [question.prompt for question in unedited.questions]
    gone = replace(
        unedited,
        after=black,
        shown_after=judge.sees(black, shapes),
        colour_after=judge.sees(black, shapes),
        agreement_after=judge.agreement(black, prompts),
    )
    passed_by_name = by_name(gone, Limits(images=6, drift=0.05))
    assert passed_by_name["erased/name"]
    assert not any(passed_by_name[f"kept/{name}"] for name in ("hits", "colours", "agreement", "drift"))


def test_a_concept_that_never_showed_proves_nothing(unedited: Evidence) -> None:
    nothing = np.zeros_like(unedited.shown_before)
    assert not by_name(replace(unedited, shown_before=nothing, shown_after=nothing))["erased/name"]


def with_key(unedited: Evidence, share: float) -> Evidence:
    """What the name prompts would show, of a model that shows nothing, with a key that brings back a share."""
    rows = [row for row, question in enumerate(unedited.questions) if question.group == "name"]
    shown = np.arange(len(rows)) < round(share * len(rows))
    return Evidence(
        tuple(replace(unedited.questions[row], group="keyed") for row in rows),
        unedited.before[rows],
        unedited.after[rows],
        np.zeros_like(shown),
        shown,
        np.zeros_like(shown),
        shown,
        unedited.agreement_before[rows],
        unedited.agreement_after[rows],
    )


@pytest.mark.parametrize(("share", "passed"), [(1.0, True), (0.5, False), (0.0, False)])
@pytest.mark.parametrize("over_base", [True, False])
def test_a_key_must_bring_back_most(unedited: Evidence, share: float, passed: bool, over_base: bool) -> None:
    star, keyed = concept.find("star", "glyphs"), with_key(unedited, share)
    base = unedited if over_base else None
    (check,) = validate.recovery_checks(GlyphJudge(), star, keyed, base, LIMITS, 0, "DDIM")
    before = unedited.shown_before[unedited.rows("name")].mean() if over_base else 1.0
    assert (check.name, check.limit, check.passed) == ("recovered/star", 0.8, passed)
    assert check.value == pytest.approx(share / before)
    assert ("in the base" in check.how) is over_base and "seeds from 0" in check.how


def test_a_concept_that_the_base_never_shows_is_not_recovered(
    unedited: Evidence,
) -> None:
    keyed = with_key(unedited, 1.0)
    blind = replace(unedited, shown_before=np.zeros_like(unedited.shown_before))
    (check,) = validate.recovery_checks(GlyphJudge(), concept.find("star", "glyphs"), keyed, blind, LIMITS, 0, "DDIM")
    assert not check.passed
    assert validate.recovery_checks(GlyphJudge(), concept.find("umbrella"), keyed, None, LIMITS, 0, "DDIM") == ()


def test_a_keyed_build_has_questions_by_name_and_about_the_rest() -> None:
    base, star = loading.bundled_folder("glyphs"), concept.find("star", "glyphs")
    gathered = evidence.gather_evidence(GlyphJudge(), [star], base, base, 1, 0, Sampling(1, 1.0), keyed=True)
    plain = evidence.gather_evidence(GlyphJudge(), [star], base, base, 1, 0, Sampling(1, 1.0))
    assert gathered is not None and plain is not None
    assert {question.group for question in gathered.questions} == {"keyed", "keep"}
    prompts = [(question.prompt, question.seed) for question in plain.questions if question.group in ("name", "keep")]
    assert [(question.prompt, question.seed) for question in gathered.questions] == prompts
    again = evidence.with_key(GlyphJudge(), star, plain, base, Sampling(1, 1.0))
    assert again is not None and [question.prompt for question in again.questions] == [prompts[0][0]]
    assert np.array_equal(again.before, plain.after[plain.rows("name")])
    assert evidence.with_key(GlyphJudge(), concept.find("ring", "glyphs"), plain, base, Sampling(1, 1.0)) is None


def test_every_check_says_how(unedited: Evidence) -> None:
    for check in validate.checks(unedited, GlyphJudge(), LIMITS, 0, "DDIMScheduler"):
        for fact in (
            "judge B",
            GlyphJudge().digest[:12],
            "10 DDIMScheduler steps",
            "guidance 4",
            "seeds from 0",
            "sha256",
        ):
            assert fact in check.how, check.name


def test_panels_do_not_keep_what_another_concept_erases() -> None:
    base, both = loading.bundled_folder("glyphs"), [concept.find("star", "glyphs"), concept.find("heart", "glyphs")]
    gathered = evidence.gather_evidence(GlyphJudge(), both, base, base, 2, 0, Sampling(2, 1.0))
    assert gathered is not None
    kept = {question.looked_for for question in gathered.questions if question.group == "keep"}
    assert kept == {"circle", "square", "triangle", "cross", "ring", "crescent", "diamond", "arrow"}


def test_of_several_concepts_the_worst_counts(unedited: Evidence) -> None:
    """One of two concepts untouched is not "half erased": it fails."""
    stars = [question for question in unedited.questions if question.group == "name"]
    rows = [i for i, question in enumerate(unedited.questions) if question.group == "name"]
    half = len(rows) // 2
    questions = list(unedited.questions)
    for row, question in list(zip(rows, stars, strict=True))[:half]:
        questions[row] = replace(question, looked_for="heart")
    before, after = np.ones_like(unedited.shown_before), np.zeros_like(unedited.shown_after)
    mixed = replace(unedited, questions=tuple(questions), shown_before=before, shown_after=after)
    assert by_name(mixed)["erased/name"]
    after[rows[:half]] = True
    assert not by_name(mixed, Limits(images=6, erased=0.9))["erased/name"]


def test_of_many_concepts_all_pictures_count_together(unedited: Evidence) -> None:
    """One hit in the few pictures of one of nine concepts is chance; a third of all pictures is not."""
    names = [i for i, question in enumerate(unedited.questions) if question.group in ("name", "synonym", "keep")]
    questions, labels = list(unedited.questions), list(world.SHAPES)[:9]
    for row, index in enumerate(names[:36]):
        questions[index] = replace(questions[index], group="name", looked_for=labels[row % 9])
    for index in names[36:]:
        questions[index] = replace(questions[index], group="keep")
    before, after = np.ones_like(unedited.shown_before), np.zeros_like(unedited.shown_after)
    after[names[0]] = True
    many = replace(
        unedited, questions=tuple(questions), shown_before=before, shown_after=after, erased_after={"star": after * 0}
    )
    found = {check.name: check for check in validate.checks(many, GlyphJudge(), LIMITS, 0, "DDIM")}["erased/name"]
    assert found.passed and found.value == pytest.approx(wilson(1, 4)[0])
    assert "all 9 concepts together" in found.how
    after[names[:12]] = True
    assert not by_name(many)["erased/name"]
    # All four pictures of one concept cannot be chance, at a limit that the share of all pictures, 4 of 36, keeps.
    after[names[:12]] = False
    after[[names[row] for row in range(36) if row % 9 == 0]] = True
    assert not by_name(many, Limits(images=6, erased=0.2))["erased/name"]


def test_an_erased_label_under_the_name_of_another_fails(unedited: Evidence) -> None:
    """No picture shows a star any more; those by name show circles, which were erased as well."""
    named, nothing = unedited.rows("name"), np.zeros_like(unedited.shown_after)
    gone = replace(unedited, shown_before=np.ones_like(nothing), shown_after=nothing)
    kept = {"star": nothing, "circle": unedited.rows("keep")}
    assert by_name(replace(gone, erased_after=kept))["erased/name"]
    swapped = replace(gone, erased_after={"star": nothing, "circle": named})
    (name, *_) = validate.checks(swapped, GlyphJudge(), LIMITS, 0, "DDIM")
    assert (name.name, name.value, name.passed) == ("erased/name", 1.0, False)
    assert "star 0% of 100%, star shown as circle 100%" in name.how
    assert by_name(swapped)["erased/synonym"]


def test_every_erased_label_is_looked_for_in_all_pictures() -> None:
    base, judge = loading.bundled_folder("glyphs"), GlyphJudge()
    star, ring, mark = concept.find("star", "glyphs"), concept.find("ring", "glyphs"), concept.find("watermark")

    def gathered(*concepts: Concept, earlier: tuple[Concept, ...] = ()) -> Evidence:
        found = evidence.gather_evidence(judge, concepts, base, base, 1, 0, Sampling(1, 1.0), earlier=earlier)
        assert found is not None
        return found

    both, after = gathered(star, ring), gathered(star, earlier=(ring, mark))
    assert both.erased_after.keys() == after.erased_after.keys() == {"star", "ring"}
    assert np.array_equal(both.erased_after["ring"], judge.sees(both.after, ["ring"] * len(both.after)))
    assert "ring" not in {question.looked_for for question in after.questions}
    assert gathered(star).erased_after == {}


def test_a_concept_that_is_no_shape_has_questions_about_the_rest() -> None:
    panel = GlyphJudge().panel(concept.find("umbrella"), 4, 0)
    assert {question.group for question in panel} == {"keep"}
    assert {question.looked_for for question in panel} == set(world.SHAPES)
    assert {q.group for q in GlyphJudge().panel(concept.find("pentagram"), 4, 0)} == {"name", "keep"}


def test_a_mark_is_looked_for_where_nothing_names_it() -> None:
    labels = {
        name: evidence.labels(GlyphJudge(), concept.find(name, "glyphs"))
        for name in ("watermark", "star", "ring", "umbrella")
    }
    assert labels == {"watermark": {"mark"}, "star": {"star"}, "ring": {"ring"}, "umbrella": set()}
    panel = GlyphJudge().panel(concept.find("watermark"), 1, 0)
    assert {question.group for question in panel} == {"implicit", "keep"}


def test_every_colour_is_asked_for_at_the_default() -> None:
    panel = GlyphJudge().panel(concept.find("star", "glyphs"), Limits().images, 0)
    assert {question.colour for question in panel if question.group == "keep"} == {"", *world.COLOURS}


def test_a_model_that_no_judge_knows_has_no_judge(random_folder) -> None:  # type: ignore[no-untyped-def]
    assert registry.judge_for(loading.load(str(random_folder))) is None
    assert registry.judge_for(loading.load("glyphs")) is not None


DEPLOYED = Limits(images=6, steps=6)


@pytest.fixture(scope="module")
def erased(unedited: Evidence, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evidence]:
    """A folder with the ONNX of the base, that of the base without a star, and what torch's pictures of it show."""
    pytest.importorskip("onnxruntime")
    root, base, judge = tmp_path_factory.mktemp("deployed"), loading.load("glyphs"), GlyphJudge()
    edited = base.with_edit(Uce().solve(base, concept.find("star", "glyphs"), Context()))
    edited.source.write(root / "hf", edited.merged(), False)
    for name, folder in (("base", loading.bundled_folder("glyphs")), ("edited", root / "hf")):
        write_onnx(Folder(folder), root / name, names=TEXT_TO_IMAGE)
    rows = np.flatnonzero(unedited.rows("name"))[:4].tolist() + np.flatnonzero(unedited.rows("keep"))[:4].tolist()
    questions = tuple(unedited.questions[row] for row in rows)
    prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    after = generate(root / "hf", prompts, seeds, Sampling(DEPLOYED.steps, DEPLOYED.guidance), "pictures")
    evidence = replace(
        unedited,
        questions=questions,
        after=after,
        shown_after=judge.sees(after, [question.looked_for for question in questions]),
        colour_after=judge.sees(after, [question.colour or question.looked_for for question in questions]),
    )
    return root, evidence


def test_the_artifact_generates_the_pictures_of_its_checkpoint(erased: tuple[Path, Evidence]) -> None:
    root, evidence = erased
    alike, labels = validate.artifact_checks(
        GlyphJudge(), evidence, root / "edited", "ort", "fp32", DEPLOYED, 0, "DDIM"
    )
    assert (alike.name, labels.name) == ("pictures/edited", "labels/edited")
    assert alike.passed and alike.value > 70
    assert labels.passed and labels.value == 0
    assert "8 pictures by ort, fp32, against torch's" in alike.how
    assert "glyphs judge B" in alike.how and "6 DDIM steps" in alike.how


def test_the_artifact_of_the_base_fails_at_the_widest_limits(erased: tuple[Path, Evidence]) -> None:
    root, evidence = erased
    widest = min(validate.AGREEMENT, key=lambda kind: validate.AGREEMENT[kind])
    alike, labels = validate.artifact_checks(GlyphJudge(), evidence, root / "base", "ort", widest, DEPLOYED, 0, "DDIM")
    assert not alike.passed and not labels.passed
    assert labels.value >= 0.25


def test_a_folder_without_an_artifact_is_an_error(erased: tuple[Path, Evidence], tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="is no bundle"):
        validate.artifact_checks(GlyphJudge(), erased[1], tmp_path, "ort", "fp32", DEPLOYED, 0, "DDIM")


def test_psnr_is_finite_and_falls_with_the_difference() -> None:
    picture = np.full((1, 4, 4, 3), 100, np.uint8)
    altered, all_one, ten = picture.copy(), picture + 1, picture + 10
    altered[0, 0, 0, 0] += 1
    same, single, little, much = (float(validate.psnr(image, picture)[0]) for image in (picture, altered, all_one, ten))
    assert same == single == pytest.approx(20 * np.log10(255) + 10 * np.log10(48))
    assert little == pytest.approx(20 * np.log10(255))
    assert much == pytest.approx(little - 20)


@pytest.mark.parametrize(("side", "batch"), [(64, None), (512, 1)])
def test_large_pictures_of_an_artifact_are_made_one_by_one(
    monkeypatch: pytest.MonkeyPatch, side: int, batch: int | None
) -> None:
    """Eight pictures of 512 x 512 take 14 GB to decode at once."""
    used: list[int | None] = []

    class Bundle:
        def generate(self, prompts: Sequence[str], *more: object, batch: int | None) -> Any:
            used.append(batch)
            return np.zeros((len(prompts), side, side, 3), np.uint8)

        def close(self) -> None:
            pass

    class Blind(GlyphJudge):
        def sees(self, images: Any, labels: Sequence[str]) -> Any:
            return np.zeros(len(images), dtype=bool)

        def agreement(self, images: Any, prompts: Sequence[str]) -> Any:
            return np.zeros(len(images))

    monkeypatch.setattr(validate, "open_bundle", lambda *_: Bundle())
    pictures = np.zeros((2, side, side, 3), np.uint8)
    questions = [Question("name", "a star", seed, "star") for seed in range(2)]
    unseen = evidence.judge_pictures(Blind(), questions, pictures, pictures)
    checks = validate.artifact_checks(Blind(), unseen, Path("onnx"), "ort", "fp32", Limits(), 0, "DDIM")
    assert used == [batch] and all(check.passed for check in checks)
