"""The page of the report: it is complete without a network, escapes its text, and shows every fact."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_report import BLOCKS, Page, leaves, pairs, star_report, written

from erasec.base import Check
from erasec.reporting.report import SHOWN, SHOWN_KEPT, SIDE, EditRecord, Report, SiteMove
from erasec.reporting.wording import STATS


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    html, _, _ = written(star_report(), tmp_path)
    page = Page(html)
    sources = [attributes.get("src") or "" for tag, attributes in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "video", "audio"}
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> | "> & `x`'
    pair = replace(star_report().pairs[0], prompt=evil, looked_for=evil)
    check = Check("erased/" + evil, 0.5, None, True, evil)
    html, facts, card = written(
        star_report(pairs=(pair,), checks=(check,), notes=(evil,), environment={"<script>": evil}), tmp_path
    )
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.text
    assert facts["pairs"][0]["prompt"] == evil
    _, body = card.split("\n---\n", 1)
    assert "<script>" not in re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    row = next(line for line in body.splitlines() if line.startswith("| erased/"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_a_link_is_only_made_of_a_web_address(tmp_path: Path) -> None:
    applied = star_report().applied[0]
    page = Page(written(star_report(), tmp_path / "a")[0])
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [applied.paper]
    page = Page(written(star_report(applied=(replace(applied, paper="javascript:alert(1)"),)), tmp_path / "b")[0])
    assert "a" not in {tag for tag, _ in page.tags}
    assert "javascript:alert(1)" in page.text


def test_pictures_are_embedded_without_loss(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image as Picture

    report = star_report()
    page = Page(written(report, tmp_path)[0])
    sources = [(attributes["src"] or "").partition(",")[2] for tag, attributes in page.tags if tag == "img"]
    images = [np.asarray(Picture.open(io.BytesIO(base64.b64decode(source)))) for source in sources[:2]]
    assert np.array_equal(images[0], report.pairs[0].before)
    assert np.array_equal(images[1], report.pairs[0].after)
    assert not np.array_equal(images[0], images[1])


def test_large_pictures_are_reduced_with_a_note(tmp_path: Path) -> None:
    large = np.zeros((512, 512, 3), dtype=np.uint8)
    pair = replace(star_report().pairs[0], before=large, after=large)
    text = f"Pictures are reduced to {SIDE} pixels."
    assert text in Page(written(star_report(pairs=(pair,)), tmp_path / "a")[0]).text
    assert text not in Page(written(star_report(), tmp_path / "b")[0]).text


def test_the_gallery_shows_the_first_pairs_and_says_how_many(tmp_path: Path) -> None:
    report = star_report()
    html, facts, _ = written(report, tmp_path)
    page = Page(html)
    assert f"Shown: {SHOWN} of 11." in page.text
    assert f"Shown: {SHOWN_KEPT} of 18." in page.text
    assert len(facts["pairs"]) == len(report.pairs)
    captions = re.findall(r"<figcaption>(.*?) <small>seed&nbsp;(\d+)</small>", html)
    expected = [(pair.prompt, str(pair.seed)) for pair in report.pairs if pair.group == "name"]
    assert captions[:SHOWN] == expected[:SHOWN]


def test_no_notes_no_warning(tmp_path: Path) -> None:
    rates = tuple(rate for rate in star_report().rates if rate["group"] != "implicit")
    page = Page(written(star_report(rates=rates), tmp_path)[0])
    assert "note" not in [attributes.get("role") for _, attributes in page.tags]


def test_blocks_are_in_network_order(tmp_path: Path) -> None:
    html, _, _ = written(star_report(), tmp_path)
    heat = html[html.index('class="heat"') :]
    rows = ["down.0.attentions.0", "mid.attentions.0", "up.1.attentions.2", "up.1.attentions.10"]
    assert re.findall(r"<tr><th>([^<]+)</th>", heat) == rows
    assert re.findall(r"<th>(\w+ \w+)</th>", heat)[:2] == ["cross k", "cross v"]


CURVES = {"loss erase": [1.0, 0.5, 0.01], "loss keep": [0.02, 0.03, 0.02], "drift": [0.0, 0.01]}


SIDE_MEMORY = {
    "attention": "mid_block.attentions.0.transformer_blocks.0.attn2",
    "mode": "side",
    "rows": 10,
    "weight": 0.7,
    "until": 0.5,
}


def learned(**changes: Any) -> Report:
    """The invented build by a learned pass."""
    stats = {"steps": 3.0, "stopped": 0.0, "loss erase_last": 0.01, "drift": 0.01}
    applied = EditRecord("kpop", "1", "", ("star",), {}, stats, 9.0, "a key brings it back", CURVES)
    return star_report(applied=(applied,), **changes)


def test_curves_are_drawn_and_kept_in_full(tmp_path: Path) -> None:
    html, facts, card = written(learned(), tmp_path)
    page = Page(html)
    assert facts["applied"][0]["curves"] == CURVES
    assert re.findall(r"<figcaption>(loss|drift)</figcaption>", html) == ["loss", "drift"]
    labels = [attributes["aria-labelledby"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    known = [attributes.get("id") for tag, attributes in page.tags]
    assert len(labels) == 2 and all(known.count(name) == 1 for label in labels for name in (label or "").split())
    assert (
        "loss erase goes from 1 to 0.01; loss keep goes from 0.02 to 0.02; 3 steps, a logarithmic scale." in page.text
    )
    assert "mean loss of the last tenth of the steps" in page.text
    assert "A key brings it back." in page.text and "A key brings it back." in card
    bare = written(star_report(), tmp_path / "without")[0]
    assert "<svg" not in bare


def test_the_page_of_a_learned_pass_has_the_facts_too(tmp_path: Path) -> None:
    html, facts, _ = written(learned(extras={"memories": [SIDE_MEMORY]}), tmp_path)
    numbers = {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))}
    assert set(Page(html).numbers) <= numbers
    shown = [value for curve in CURVES.values() for value in (curve[0], curve[-1])]
    assert {*shown, *facts["applied"][0]["stats"].values()} <= set(Page(html).numbers)


def test_the_limits_of_a_pass_are_shown_only_for_that_pass(tmp_path: Path) -> None:
    html, _, card = written(star_report(), tmp_path)
    page = Page(html).text
    assert "A key brings it back." not in page + card and "linear map" not in card


def test_tensors_of_one_cell_count_as_one_vector(tmp_path: Path) -> None:
    moves = (
        SiteMove("a.attn2.to_k.weight", BLOCKS[1], "cross", "k", (4, 4), 4.0, 0.3, 1),
        SiteMove("b.attn2.to_k.weight", BLOCKS[1], "cross", "k", (4, 4), 3.0, 0.4, 1),
        SiteMove("new.bias", "conv_in", "other", "", (4,), 0.0, 0.1, 1),
    )
    html, facts, _ = written(star_report(moves=moves), tmp_path)
    assert [move["change"] for move in facts["moves"]] == pytest.approx([0.075, 0.4 / 3, None])
    assert facts["moves"][2]["change_text"] == "inf"
    assert '<data value="0.1">10\u00a0%</data>' in html and ">infinite</data>" in html
    assert "3 tensors changed; all others are those of the base." in Page(html).text


def test_extras_are_shown(tmp_path: Path) -> None:
    extras = {"memories": [SIDE_MEMORY], "tokens": ["<mark-1>"], "negative": "a <mark-1> in the corner"}
    html, facts, card = written(star_report(extras=extras), tmp_path / "all")
    page = Page(html)
    assert facts["extras"] == {**extras, "keys": []}
    for word in (SIDE_MEMORY["attention"], "side", "<mark-1>", "a <mark-1> in the corner"):
        assert str(word) in page.text
    assert {10, 0.7, 0.5} <= set(page.numbers)
    warning = (
        "The weights are not all of the edit: without the memory, new tokens and negative prompt, star may be back"
    )
    assert warning in page.text and warning in card
    assert "The negative prompt only acts with guidance" in page.text
    bare = Page(written(star_report(), tmp_path / "none")[0]).text
    assert "In addition to the weights" not in bare and "may be back" not in bare


def test_a_build_that_changed_no_weight_says_so(tmp_path: Path) -> None:
    html, facts, _ = written(star_report(moves=(), extras={"memories": [SIDE_MEMORY]}), tmp_path)
    assert facts["verdict"] == "star kept out of glyphs"
    assert "The weights did not change: without the memory, star is back." in Page(html).text
    assert "No weight was changed." in Page(html).text


def test_pictures_with_the_key_are_good_if_they_show_the_concept(tmp_path: Path) -> None:
    shown = pairs("keyed", ("a photo of a star",), "star", "star", 2)
    kept = star_report(pairs=pairs("name", ("a photo of a star",), "star", "star", 2))
    for report, colour in ((star_report(pairs=shown), "good"), (kept, "bad")):
        html = written(report, tmp_path / colour)[0]
        assert re.findall(r'<b class="(\w+)">●', html) == [colour, colour]
    rates = ({"group": "keyed", "looked_for": "star", "images": 2, "before": 0.0, "after": 1.0},)
    keyed = star_report(concepts=(), pairs=shown, rates=rates, extras={"memories": [SIDE_MEMORY], "keys": ["star"]})
    html, facts, _ = written(keyed, tmp_path / "keyed")
    assert facts["verdict"] == "glyphs with the key of star"
    assert "With the key" in Page(html).text and "is back." not in Page(html).text


def test_a_stat_that_the_report_does_not_know_is_shown_under_its_own_name(tmp_path: Path) -> None:
    html, facts, _ = written(star_report(), tmp_path)
    assert "of_my_own" not in STATS and facts["applied"][0]["stats"]["of_my_own"] == 7.5
    rows = re.findall(r"<tr><td><code>(\w+)</code>(?:<small>([^<]*)</small>)?</td>.*?<data value=\"([^\"]*)\">", html)
    by_name = {name: (explanation, float(value)) for name, explanation, value in rows}
    assert by_name["of_my_own"] == ("", 7.5)
    assert by_name["rank"] == (STATS["rank"], 21.0)
    assert set(by_name) == set(star_report().applied[0].stats)


def test_pairs_of_several_concepts_have_their_own_sections_and_those_that_nobody_judged_say_so(tmp_path: Path) -> None:
    star = pairs("name", ("a photo of a star",), "star", "circle", 2)
    ring = pairs("name", ("a photo of a ring",), "ring", "circle", 1)
    moon = tuple(replace(pair, looked_for="") for pair in pairs("name", ("a moon",), "crescent", "circle", 1))
    named = tuple(
        replace(pair, concept=name) for name, own in (("star", star), ("ring", ring), ("moon", moon)) for pair in own
    )
    html = written(star_report(pairs=named), tmp_path / "three")[0]
    page = Page(html).text
    assert all(f"By name: {name}" in page for name in ("star", "ring", "moon"))
    assert html.count("not\u00a0judged</small>") == 1 and "marked as not judged" in page
    assert "Shown: 2 of 2. Hit rate" not in page  # that of the group is of several concepts
    html = written(star_report(pairs=tuple(replace(pair, concept="star") for pair in star)), tmp_path / "one")[0]
    assert "By name: star" not in html and "not\u00a0judged" not in html
    assert "Shown: 2 of 2. Hit rate" in Page(html).text


def test_pictures_of_the_first_concepts_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    (pair, *_) = star_report().pairs
    for count, said in ((16, ""), (20, "Pictures of 4 more concepts are not shown")):
        pairs = tuple(replace(pair, concept=f"c{number}", group="name") for number in range(count))
        html, facts, _ = written(star_report(pairs=pairs), tmp_path / str(count))
        assert html.count("<h3>By name: c") == 16 and len(facts["pairs"]) == count
        assert said in html and ("more concepts" in html) == bool(said)


def test_many_concepts_have_a_headline_and_a_few_open_notes(tmp_path: Path) -> None:
    names = tuple(f"person {number}" for number in range(500))
    rates = tuple({"group": "implicit", "looked_for": name, "images": 2, "before": 1, "after": 0.5} for name in names)
    notes = tuple(f"{name} was renamed." for name in names)
    concepts = tuple({"name": name, "erase": (name,), "synonyms": (), "anchor": ""} for name in names)
    html, _, card = written(star_report(concepts=concepts, notes=notes, rates=rates, judged=names), tmp_path)
    headline = html.split("<h1")[1].split("</h1>")[0]
    assert "person 0, person 1, person 2 and 497 more" in headline and "person 3" not in headline
    assert (
        "show person 0 in 50\u00a0%, person 1 in 50\u00a0%, person 2 in 50\u00a0%, person 3 in 50\u00a0% and 496 more"
        in html
    )
    assert "<summary>493 more notes</summary>" in html and "person 499 was renamed." in html
    assert card.count("> **Note.**") == 8 and "493 more notes are in `report.html`." in card
    longest = max(len(line) for line in card.splitlines())
    assert longest < 800
    few = written(star_report(notes=notes[:3]), tmp_path / "few")[0]
    assert "more notes" not in few and few.count("<b>Note.</b>") == 4  # and one about implicit prompts
