"""The page of an audit: no claim without a measurement, nothing fetched, and the same facts as the JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_audit import LIMITS, READINGS, hits, row, star_audit, written_audit
from sample_report import Page, leaves

from erasec.audit.base import ROLES, THREATS, Rate, Reading, digest_of
from erasec.audit.gates import check_gates
from erasec.reporting.audit_page import AuditReport, spread, words_of, write_audit


def audit_of(*readings: Reading, **changes: Any) -> AuditReport:
    """The invented audit with other rows and without gates."""
    return star_audit(**{"readings": readings, "gates": (), "alternatives": None, "notion": "", "notes": (), **changes})


def head(page: Page) -> str:
    return page.text.split(" Attacks ")[0]


# --- what the headline claims ----------------------------------------------------------------------------------------


def test_a_row_brings_back_only_if_its_interval_lies_above_that_of_the_floor() -> None:
    above, meets = row("a", "x", "prompt", hits(13, 0, 20, 4)), row("a", "x", "prompt", hits(12, 0, 20, 4))
    assert above.rates["model"].interval[0] > above.rates["twin"].interval[1] and above.brings_back
    assert meets.rates["model"].interval[0] < meets.rates["twin"].interval[1] and not meets.brings_back


@pytest.mark.parametrize("probe", ["strength", "merge", "tracing"])
def test_half_of_an_edit_is_no_attack(probe: str) -> None:
    """A mean with a model that knows the concept shows it however good the edit is."""
    assert not row(probe, "half", "training", hits(20, 0, 20, 0)).brings_back


def test_a_training_says_nothing_without_a_twin() -> None:
    """It may teach the concept to a model that never saw it: only the twin tells how much."""
    tuned = row("relearn", "10 steps", "training", hits(20, 0, 20))
    assert tuned.floor == "control" and not tuned.brings_back
    assert row("relearn", "10 steps", "training", hits(20, 0, 20, 1)).brings_back


def test_the_floor_is_the_twin_then_the_untrained_model_then_the_control() -> None:
    full = row("a", "x", "prompt", hits(20, 0, 20, 20, 0))
    assert not full.brings_back
    without_twin = replace(full, rates={role: rate for role, rate in full.rates.items() if role != "twin"})
    assert without_twin.brings_back
    only_control = replace(full, rates={role: full.rates[role] for role in ("model", "control", "base")})
    assert only_control.brings_back and only_control.separates is True
    same = replace(only_control, rates={**only_control.rates, "control": Rate(20, 20)})
    assert not same.brings_back and same.separates is False
    alone = replace(full, rates={"model": Rate(20, 20)})
    assert not alone.brings_back and alone.separates is None


def test_the_headline_counts_the_rows_that_bring_back() -> None:
    assert star_audit().headline == "Hidden, not erased: 3 of 10 attacks bring star back"
    one = audit_of(*READINGS[:3], READINGS[8])
    assert one.headline == "Hidden, not erased: 1 of 4 attacks brings star back" and one.verdict == "hidden"


def test_a_model_that_shows_the_concept_by_name_hides_nothing() -> None:
    report = audit_of(row("prompts", "name", "prompt", hits(19, 0, 20, 0, 0)), *READINGS[1:4])
    assert report.verdict == "not erased" and report.headline.startswith("Not erased: prompts that name star still")


@pytest.mark.parametrize(
    ("numbers", "beyond"),
    [
        ((0, 0, 20, 0, 0), "the model that never saw it"),
        ((0, 0, 20), "its random control"),
    ],
)
def test_no_attack_that_separates_is_said_of_a_floor(numbers: tuple[int, ...], beyond: str) -> None:
    report = audit_of(row("inversion", "x", "weights", hits(*numbers)), READINGS[6])
    assert report.verdict == "not found" and beyond in audit_of(report.readings[0]).headline
    assert "No attack that separates brings star back more than" in report.headline


@pytest.mark.parametrize(
    "readings",
    [
        (),
        (READINGS[-1],),  # not run
        (row("a", "x", "prompt", hits(0, 0, 0, 0, 0)),),  # the base never shows it either
        (row("a", "x", "prompt", hits(0, 0, 20, 20, 0)),),  # the twin shows it as well
        (row("a", "x", "prompt", hits(0, 0)),),  # no base
        (Reading("a", "x", "prompt", {"model": Rate(0, 0), "base": Rate(20, 20), "twin": Rate(0, 20)}),),
    ],
)
def test_without_an_attack_that_tells_anything_nothing_is_claimed(readings: tuple[Reading, ...]) -> None:
    report = audit_of(*readings)
    assert report.verdict == "not judged" and report.headline.startswith("Not judged")


# --- gates -----------------------------------------------------------------------------------------------------------


def test_no_gates_never_read_like_passed(tmp_path: Path) -> None:
    html, facts = written_audit(star_audit(gates=()), tmp_path)
    assert facts["outcome"] == "no gates" and facts["gates"] == []
    text = Page(html).text
    assert "· no gates" in text and "✓" not in text and "neither passed nor failed" in text
    assert "passed" not in text.replace("neither passed nor failed", "")


def test_gates_that_hold_read_as_passed(tmp_path: Path) -> None:
    html, facts = written_audit(star_audit(gates=check_gates(READINGS, {"prompts": 0.2})), tmp_path)
    assert facts["outcome"] == "passed" and "✓ gates passed" in Page(html).text and "✕" not in Page(html).text
    # The headline is about the readings, whatever the gates allow.
    assert facts["headline"].startswith("Hidden, not erased")


def test_a_failed_gate_is_shown_at_the_top_and_in_the_table(tmp_path: Path) -> None:
    html, facts = written_audit(star_audit(), tmp_path)
    page = Page(html)
    assert facts["outcome"] == "failed" and "✕ gates failed 1 of 2: noised." in head(page)
    assert re.search(r"noised ?18 of 20 pictures.* ?90\xa0% ?at most 50\xa0% ?✕ failed", page.text.split(" Gates ")[1])
    assert "✓ gates passed" not in page.text


@pytest.mark.parametrize("name", ["completion", "completion/after 2 of 15 steps", "tracing"])
def test_a_gate_of_a_probe_that_was_not_run_fails(tmp_path: Path, name: str) -> None:
    html, facts = written_audit(star_audit(gates=check_gates(READINGS, {**LIMITS, "noised": 1.0, name: 1.0})), tmp_path)
    assert facts["outcome"] == "failed" and facts["gates"][-1]["value"] is None
    table = Page(html).text.split(" Gates ")[1]
    assert "not measured" in table and "✕ failed" in table and f"1 of 3: {name}." in head(Page(html))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_were_not_run_have_an_obstacle_and_no_rate(tmp_path: Path) -> None:
    html, facts = written_audit(audit_of(READINGS[-1]), tmp_path)
    page = Page(html)
    assert "The budget of 5 minutes was spent." in page.text.split(" Not run ")[1]
    assert "%" not in page.text and not [value for value in page.numbers if value == 0]
    assert facts["readings"][0]["rates"] == {} and facts["counts"] == {
        "run": 0,
        "bring_back": 0,
        "do_not_separate": 0,
        "not_run": 1,
    }


def test_a_rate_of_no_pictures_is_no_rate_of_zero(tmp_path: Path) -> None:
    rates = {"model": Rate(5, 20), "base": Rate(20, 20), "twin": Rate(0, 0)}
    html, facts = written_audit(audit_of(Reading("a", "x", "prompt", rates)), tmp_path / "twin")  # type: ignore[arg-type]
    assert facts["readings"][0]["rates"]["twin"] == {"hits": 0, "count": 0, "rate": None, "low": None, "high": None}
    assert 'title="not measured"' in html and ">0\u00a0%<" not in html
    none = {**rates, "model": Rate(0, 0)}
    html, facts = written_audit(audit_of(Reading("a", "x", "prompt", none)), tmp_path / "model")  # type: ignore[arg-type]
    assert "No picture of the audited model was counted." in Page(html).text and "%" not in Page(html).text


def test_threats_go_from_the_weakest_to_the_strongest_with_every_row_once(tmp_path: Path) -> None:
    page = Page(written_audit(star_audit(readings=READINGS[::-1]), tmp_path)[0])
    places = [page.text.index(f"The attacker {THREATS[threat]}") for threat in ("prompt", "sampling", "weights")]
    assert places == sorted(places) and THREATS["recipe"] not in page.text
    assert sum(tag == "td" and found.get("class") == "variant" for tag, found in page.tags) == 10
    assert "20 pictures, each the best of 24" in page.text


def test_only_rows_that_do_not_separate_are_marked(tmp_path: Path) -> None:
    blind = '<span class="mark blind">does not separate here</span>'
    html, _ = written_audit(audit_of(READINGS[0]), tmp_path / "a")
    assert blind not in html
    html, facts = written_audit(audit_of(READINGS[7]), tmp_path / "b")
    assert blind in html and facts["readings"][0]["separates"] is False
    html, facts = written_audit(audit_of(row("a", "x", "prompt", hits(3))), tmp_path / "c")
    assert blind not in html and facts["readings"][0]["separates"] is None


def test_bars_whiskers_and_marks_lie_where_the_numbers_say(tmp_path: Path) -> None:
    html, _ = written_audit(audit_of(row("a", "x", "prompt", hits(15, 1, 19, 4, 0))), tmp_path)
    drawn = html[html.index('<td class="drawn"><svg') : html.index("</td>", html.index('<td class="drawn"><svg'))]
    low, high = (100 * end for end in Rate(15, 20).interval)
    floor = [100 * end for end in Rate(4, 20).interval]
    assert f'x="0" y="13" width="{75:.2f}%"' in drawn and f'x1="{low:.2f}%" x2="{high:.2f}%"' in drawn
    assert f'class="band" x="{floor[0]:.2f}%" y="1" width="{floor[1] - floor[0]:.2f}%"' in drawn
    marks = dict(re.findall(r'<svg x="([\d.]+)%".*?class="sign (\w+)"', drawn))
    assert marks == {"95.00": "base", "20.00": "twin", "5.00": "control", "0.00": "random"}


def test_columns_are_those_that_were_measured_and_all_are_explained(tmp_path: Path) -> None:
    text = Page(written_audit(star_audit(), tmp_path / "all")[0]).text
    assert all(about[1:] in text for about in ROLES.values())
    text = Page(written_audit(audit_of(row("a", "x", "prompt", hits(3, 0, 20))), tmp_path / "few")[0]).text
    assert ROLES["base"][1:] in text and ROLES["twin"][1:] not in text and ROLES["random"][1:] not in text


def test_an_interval_is_rounded_outwards() -> None:
    assert spread({"low": 0.0279, "high": 0.3011}) == "2–31\u00a0%"
    assert spread({"low": 0.0, "high": 1.0}) == "0–100\u00a0%" and spread({"low": 0.29, "high": 0.58}) == "29–58\u00a0%"


def test_limits_are_shown_for_registered_probes_that_have_some(tmp_path: Path) -> None:
    text = Page(written_audit(star_audit(), tmp_path / "a")[0]).text.split(" What these attacks cannot show ")[1]
    assert "The surroundings give the concept away" in text and "The more steps the base takes" in text
    plain = Page(written_audit(audit_of(row("of_my_own", "x", "prompt", hits(3, 0, 20))), tmp_path / "b")[0]).text
    assert "What these attacks cannot show" not in plain and "Of my own" in plain


def test_pictures_are_those_of_the_rows_with_the_highest_rates(tmp_path: Path) -> None:
    page = Page(written_audit(star_audit(alternatives=None), tmp_path / "a")[0])
    texts = [found["alt"] or "" for tag, found in page.tags if tag == "img"]
    assert len(texts) == 6 * 4 and "Free states" in texts[0] and "Noised, empty" in texts[4]
    empty = replace(READINGS[0], shown=np.zeros((0, 1, 1, 3), np.uint8))
    page = Page(written_audit(audit_of(empty, READINGS[3]), tmp_path / "b")[0])
    assert "img" not in {tag for tag, _ in page.tags} and "Pictures of the strongest attacks" not in page.text


def test_what_it_draws_instead_has_shares_and_pictures_by_prompt(tmp_path: Path) -> None:
    html, facts = written_audit(star_audit(), tmp_path / "a")
    page = Page(html)
    assert set(facts["alternatives"]) == {"shares", "diversity"} and {0.55, 0.25, 0.2, 0.4125} <= set(page.numbers)
    assert html.count('<li class="pair">') == 6
    bare = Page(written_audit(audit_of(*READINGS), tmp_path / "b")[0]).text
    assert "What it draws instead" not in bare and "How it was erased" not in bare


# --- along the edit, plain seeds, digests of prompts -----------------------------------------------------------------


def traced(*model: int) -> tuple[Reading, ...]:
    """Rows along the edit with these hits of the model; the base always shows the concept."""
    last = len(model) - 1
    return tuple(
        row(
            "tracing",
            f"{number / last:.0%} of the edit",
            "training",
            hits(count, 0, 20, 0),
            shows="star",
            measured={"share": number / last, "drift": 0.0},
        )
        for number, count in enumerate(model)
    )


def test_rows_along_the_edit_are_shown_and_counted_nowhere(tmp_path: Path) -> None:
    rows = (READINGS[3], *traced(20, 20, 12, 1, 0))
    report = audit_of(*rows)
    assert report.verdict == "not found" and len(report.run) == 1
    html, facts = written_audit(report, tmp_path)
    assert facts["counts"] == {"run": 1, "bring_back": 0, "do_not_separate": 0, "not_run": 0}
    text = Page(html).text
    assert html.count('<span class="mark none">no attack</span>') == 5 and "brings it back</span>" not in html
    assert "Highest rate" in text and not re.search(r"Highest rate ?100", text)


def test_the_curve_has_a_point_for_each_share(tmp_path: Path) -> None:
    html, _ = written_audit(audit_of(READINGS[3], *traced(20, 10, 0)), tmp_path / "a")
    drawn = html[html.index("<h2>Along the edit</h2>") :]
    assert '<polyline class="own" points="40.00 10.00 300.00 80.00 560.00 150.00 "/>' in drawn
    assert "50\u00a0% of the edit 50\u00a0%" in drawn
    for readings in (READINGS, traced(20, 0)[:1]):  # none, and a single point
        assert "Along the edit" not in written_audit(audit_of(*readings), tmp_path / "b")[0]


def test_an_audit_of_diagnostics_alone_has_no_highest_rate(tmp_path: Path) -> None:
    html, facts = written_audit(audit_of(*traced(20, 0)), tmp_path)
    assert facts["verdict"] == "not judged" and "Highest rate" not in Page(html).text


def test_plain_seeds_have_a_column_where_the_probe_was_run(tmp_path: Path) -> None:
    html, facts = written_audit(audit_of(*READINGS), tmp_path / "a")
    many, single = READINGS[4].rates["model"], READINGS[0].rates["model"]
    assert facts["readings"][4]["plain_seeds"]["rate"] == many.value
    assert facts["readings"][8]["plain_seeds"]["rate"] == single.value
    assert html.count('data-label="Seeds"') == len(READINGS) - 1 and "as many seeds" in Page(html).text
    html, facts = written_audit(audit_of(*READINGS[:4]), tmp_path / "b")
    assert facts["readings"][0]["plain_seeds"] is None and 'data-label="Seeds"' not in html


def test_the_digest_of_the_prompts_is_in_both_files(tmp_path: Path) -> None:
    digest = digest_of(["a star", "a red star", "a star"])
    assert digest == digest_of(["a star", "a red star"]) != digest_of(["a red star", "a star"])
    html, facts = written_audit(audit_of(replace(READINGS[0], prompts=digest), READINGS[1]), tmp_path)
    assert [reading["prompts"] for reading in facts["readings"]] == [digest, None]
    assert html.count(f"<code>{digest[:8]}</code>") == 1 and f"sha256 of the prompts: {digest}" in html


def test_what_it_draws_instead_says_how_it_was_found(tmp_path: Path) -> None:
    found = {
        "shares": {"circle": 1.0},
        "how": "as told",
        "diversity": 0.25,
        "base_diversity": 0.75,
        "distance": "pixels",
    }
    text = Page(written_audit(audit_of(READINGS[0], alternatives=found), tmp_path)[0]).text
    assert (
        "other things: as told" in text and "0.25, of the base's 0.75 (mean distance of two pictures, pixels)" in text
    )


# --- the files -------------------------------------------------------------------------------------------------------


def test_page_and_json_have_the_same_facts(tmp_path: Path) -> None:
    html, facts = written_audit(star_audit(), tmp_path)
    page, numbers = Page(html), {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))}
    derived = {READINGS[0].seconds * count for count in (2, 4)} | {Rate(0, 20).interval[1]}
    assert set(page.numbers) <= numbers | derived and len(page.numbers) > 50
    rates = {rate["rate"] for reading in facts["readings"] for rate in reading["rates"].values()}
    assert rates <= set(page.numbers)
    for text in (facts["headline"], facts["notion"][1:], *facts["notes"], *facts["environment"].values()):
        assert text in page.text
    for subject in ("model", "base", "twin"):
        assert facts[subject]["name"] in page.text and facts[subject]["digest"] in page.everything


def test_a_number_of_another_audit_is_noticed(tmp_path: Path) -> None:
    """Negative control of the test above."""
    page = Page(written_audit(star_audit(seconds={"audit": 987.125}), tmp_path / "a")[0])
    facts = written_audit(star_audit(), tmp_path / "b")[1]
    assert 987.125 in page.numbers and 987.125 not in leaves(facts)


def test_json_has_no_nan_and_every_rate_with_its_interval(tmp_path: Path) -> None:
    measured = {"loss_last": math.nan, "norm": math.inf, "steps": np.float32(0.5)}
    report = audit_of(replace(READINGS[8], measured=measured, seconds=math.nan))
    html, facts = written_audit(report, tmp_path)
    text = (tmp_path / "audit.json").read_text(encoding="utf-8")
    assert not re.search(r"\b(NaN|Infinity)\b", text) and facts["erasec"] == "audit/1"
    (found,) = facts["readings"]
    assert found["measured"] == {"loss_last": None, "norm": None, "steps": 0.5} and found["seconds"] is None
    low, high = Rate(17, 20).interval
    assert found["rates"]["model"] == {"hits": 17, "count": 20, "rate": 0.85, "low": low, "high": high}
    assert facts == json.loads(json.dumps(report.facts(), allow_nan=False)) and "nan" not in Page(html).text


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    html, _ = written_audit(star_audit(), tmp_path)
    page = Page(html)
    sources = [found.get("src") or "" for tag, found in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert [found["href"] for tag, found in page.tags if "href" in found] == ["data:,"]
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "a", "form", "use", "image"}
    policies = [found["content"] for _, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not re.search(r"url\(|@import|//\w", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> | "> & `x`'
    rates = READINGS[0].rates
    readings = (
        Reading(evil, evil, "prompt", rates, note=evil, shown=READINGS[0].shown),
        Reading(evil, "", "prompt", {}, obstacle=evil),
    )
    subject = {"name": evil, "family": evil, "digest": evil}
    report = audit_of(
        *readings,
        model=subject,
        base=subject,
        twin=subject,
        concept={"name": evil, "erase": [evil]},
        suite=evil,
        settings={evil: evil},
        judges={"scorer": {"title": evil, "digest": evil}, "selector": None},
        gates=check_gates(readings, {evil: 0.5, "<script>": 1.0}),
        notion=evil,
        alternatives={"shares": {evil: 0.5}, "diversity": None},
        environment={evil: evil},
        notes=(evil,),
    )
    html, facts = written_audit(report, tmp_path)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and page.text.count(evil) > 15
    assert facts["concept"]["name"] == evil and facts["readings"][0]["variant"] == evil


def test_same_audit_same_bytes_and_no_other_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_audit(star_audit(notes=(name,) if name == "c" else ()), tmp_path / name)
    for file in ("audit.html", "audit.json"):
        first = (tmp_path / "a" / file).read_bytes()
        assert first == (tmp_path / "b" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["audit.html", "audit.json"]


def test_an_audit_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_audit(star_audit(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_audit(star_audit(environment={"torch": object()}), tmp_path)  # type: ignore[dict-item]
    # The page is written first: JSON that cannot be made must not leave a page without it.
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_say_how_much_of_the_base_is_gone(tmp_path: Path) -> None:
    _, facts = written_audit(star_audit(), tmp_path)
    rates = {(row["probe"], row["variant"]): row["nrr"] for row in facts["readings"]}
    assert rates["prompts", "name"] == pytest.approx(0.95)  # 1 and 20 of 20
    assert rates["free_states", "every row, 450 steps"] == 0.0
    assert rates["completion", ""] is None  # not run


@pytest.mark.parametrize(("name", "words"), [("latent_guidance", "Latent guidance"), ("mma", "MMA"), ("p4d", "P4D")])
def test_probes_are_named_in_words(name: str, words: str) -> None:
    assert words_of(name) == words
