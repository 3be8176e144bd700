"""The report: the same facts in all three files, nothing fetched or hidden, and no claim without a measurement."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from erasec.base import Check
from erasec.glyphs import world
from erasec.reporting.report import SHOWN, SHOWN_KEPT, SIDE, Applied, Pair, Report, SiteMove, Written, write

Image = np.ndarray[Any, np.dtype[np.uint8]]

BLOCKS = ("up.1.attentions.10.0", "down.0.attentions.0.0", "mid_block.attentions.0.0", "up.1.attentions.2.0")
FILES = {
    "hf": ("model_index.json", "unet/diffusion_pytorch_model.safetensors"),
    "onnx": ("unet/model.onnx", "vae_decoder/model.onnx"),
}


@cache
def pictures(shape: str) -> tuple[Image, ...]:
    """Rendered pictures that show only ``shape``."""
    return tuple(item.image for item in samples() if item.shapes == {shape})


@cache
def samples() -> tuple[world.Sample, ...]:
    return tuple(world.sample(3, index) for index in range(200))


def pairs(group: str, prompts: tuple[str, ...], before: str, after: str, count: int) -> tuple[Pair, ...]:
    return tuple(
        Pair(group, prompts[i % len(prompts)], 100 + i, one, other, before, True, before == after)
        for i, (one, other) in enumerate(islice(zip(cycle(pictures(before)), cycle(pictures(after))), count))
    )


def star_report(**changes: Any) -> Report:
    """A made-up build that erases the star: gone by name and by synonym, alive in implicit scenes, the rest kept."""
    others = tuple(name for name in world.SHAPES if name != "star")
    kept = tuple(pair for name in others for pair in pairs("keep", (f"a photo of a {name}",), name, name, 2))
    how = "judge B (sha256 1f2e3d4c), 5 prompts x 20 seeds, 25 steps DDIM, guidance 4"
    report = Report(
        model={"name": "glyphs", "revision": "", "family": "sd1", "digest": "ab" * 32},
        concepts=(
            {"name": "star", "erase": ("star",), "synonyms": ("pentagram", "five-pointed spark"), "anchor": "circle",
             "keep": others, "implicit": world.implicit_captions("star"),
             "templates": ("{}", "a photo of a {}"), "label": "", "notes": ""},
        ),
        applied=(
            Applied("uce", "1", "https://arxiv.org/abs/2308.14761", "star", {"lamb": 0.5, "tokens": "all"},
                    {"condition": 48213.7, "sigma_min": 0.2713, "sigma_max": 1.3719, "erased_residual": 3.1e-7,
                     "keep_drift": 0.00412, "rank": 21.0, "rows_erased": 120.0, "rows_kept": 1840.0, "ridge": 1e-6,
                     "of_my_own": 7.5}, 1.84),
        ),
        moves=tuple(
            SiteMove(f"{block}.attn2.to_{proj}.weight", block, "cross", proj, (64, 128), 3.5, 3.5 * change, 21)
            for at, block in enumerate(BLOCKS)
            for proj, change in (("v", 0.031 + 0.021 * at), ("k", 0.0119 + 0.011 * at))
        ),
        checks=(
            Check("finite", 0.0, 0.0, True, "every tensor of unet, vae, text_encoder"),
            Check("erased/name", 0.02, 0.1, True, how),
            Check("erased/synonym", 0.045, 0.1, True, how),
            Check("erased/implicit", 0.6, None, True, how),
            Check("kept/shapes", 0.9391, 0.9, True, how),
            Check("parity/onnx/unet", 2.31e-7, 1e-4, True, "4 shapes, 3 timesteps, relative to torch"),
        ),
        pairs=(
            *pairs("name", ("a photo of a star", "a red star"), "star", "circle", 11),
            *pairs("synonym", ("a drawing of a pentagram", "a five-pointed spark on navy"), "star", "circle", 11),
            *pairs("implicit", world.implicit_captions("star"), "star", "star", 6),
            *kept,
        ),
        rates=(
            {"group": "name", "looked_for": "star", "images": 100, "before": 0.97, "after": 0.02},
            {"group": "synonym", "looked_for": "star", "images": 200, "before": 0.985, "after": 0.045},
            {"group": "implicit", "looked_for": "star", "images": 100, "before": 1.0, "after": 0.6},
            *({"group": "keep", "looked_for": name, "images": 50, "before": 0.96, "after": 0.93 + 0.01 * (at % 4)}
              for at, name in enumerate(others)),
        ),
        written=tuple(
            Written(target, target, {name: (1234567 * (at + 1), f"{at}f" * 32) for at, name in enumerate(files)})
            for target, files in FILES.items()
        ),
        seconds={"load": 1.23, "solve": 1.84, "merge": 0.61, "hf": 0.35, "onnx": 14.2, "judge": 51.7},
        environment={"erasec": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "diffusers": "0.42.1"},
        notes=(),
        passed=True,
    )  # fmt: skip
    return replace(report, **changes)


def written(report: Report, out: Path) -> tuple[str, dict[str, Any], str]:
    """(page, facts, card) as they lie on disk."""
    write(report, out)
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return (out / "report.html").read_text(encoding="utf-8"), facts, (out / "README.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a browser would: text, tags with attributes, ``<data>`` numbers; and that every tag is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", "".join(self.texts))

    @property
    def numbers(self) -> list[float]:
        return [float(attributes["value"] or "nan") for tag, attributes in self.tags if tag == "data"]

    @property
    def everything(self) -> str:
        return self.text + " ".join(str(value) for _, attributes in self.tags for value in attributes.values())


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def test_page_and_json_tell_the_same_facts(tmp_path: Path) -> None:
    html, facts, _ = written(star_report(pairs=star_report().pairs[:3]), tmp_path)
    page = Page(html)
    numbers = {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))}
    assert set(page.numbers) <= numbers
    assert len(page.numbers) > 60
    told = set(page.numbers)
    for part in ("checks", "rates", "seconds", "summary"):
        floats = {leaf for leaf in leaves(facts[part]) if isinstance(leaf, float)}
        assert floats and floats <= told, part
    assert set(facts["applied"][0]["stats"].values()) <= told
    assert {move["change"] for move in facts["moves"]} <= told
    groups = ("name", "synonym", "implicit", "keep")  # the page calls them by their titles
    texts = {leaf for leaf in leaves({**facts, "schema": ""}) if isinstance(leaf, str) and leaf not in groups}
    assert len(texts) > 60
    assert [text for text in sorted(texts) if text not in page.everything] == []


def test_a_number_of_another_report_is_noticed(tmp_path: Path) -> None:
    """Negative control of the test above."""
    page = Page(written(star_report(seconds={"load": 987.125}), tmp_path / "a")[0])
    facts = written(star_report(), tmp_path / "b")[1]
    assert set(page.numbers) - {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))} == {987.125}


def test_same_report_same_bytes(tmp_path: Path) -> None:
    names = ("report.html", "report.json", "README.md")
    write(star_report(), tmp_path / "a")
    write(star_report(), tmp_path / "b")
    write(star_report(notes=("another",)), tmp_path / "c")
    for name in names:
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes()
        assert first != (tmp_path / "c" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)


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


def test_pictures_are_the_very_pictures(tmp_path: Path) -> None:
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


def test_large_pictures_are_reduced_and_that_is_said(tmp_path: Path) -> None:
    large = np.zeros((512, 512, 3), dtype=np.uint8)
    pair = replace(star_report().pairs[0], before=large, after=large)
    said = f"Pictures are reduced to {SIDE} pixels."
    assert said in Page(written(star_report(pairs=(pair,)), tmp_path / "a")[0]).text
    assert said not in Page(written(star_report(), tmp_path / "b")[0]).text


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


def test_a_passed_build_says_what_was_erased(tmp_path: Path) -> None:
    html, facts, card = written(star_report(), tmp_path)
    assert facts["verdict"] == "star erased from glyphs"
    assert "✓ passed" in Page(html).text and "rejected" not in Page(html).text.split("Checks")[0]
    assert "**Passed**" in card and "Rejected" not in card


def test_a_failed_build_says_rejected(tmp_path: Path) -> None:
    finite, by_name, *rest = star_report().checks
    checks = (finite, replace(by_name, value=0.4, passed=False), *rest)
    html, facts, card = written(star_report(checks=checks, passed=False), tmp_path)
    assert facts["verdict"] == "build rejected: erased/name failed"
    assert facts["passed"] is False and facts["failed"] == ["erased/name"]
    page = Page(html)
    assert "✕ rejected 1 of 6 checks failed: erased/name." in page.text
    assert "✓ passed" not in page.text.split("Before and after")[0] and "erased from" not in page.text
    assert "**Rejected**: erased/name failed." in card and "**Passed**" not in card


@pytest.mark.parametrize("changes", [{"rates": ()}, {"checks": ()}])
def test_nothing_is_called_erased_that_was_not_measured(tmp_path: Path, changes: dict[str, Any]) -> None:
    note = "no judge: erasure was not measured"
    html, facts, card = written(star_report(**changes, notes=(note,)), tmp_path)
    assert facts["verdict"] == "glyphs edited; whether star is gone was not measured"
    assert note in Page(html).text.split("Before and after")[0]
    assert note in card and "erased from" not in html + card


def test_a_mark_that_no_limit_holds_is_said_to_be_measured(tmp_path: Path) -> None:
    """A mark comes with prompts that do not name it: its rates are implicit alone."""
    mark = {**star_report().concepts[0], "name": "watermark", "kind": "mark", "label": "mark"}
    rates = tuple({**rate, "looked_for": "mark"} for rate in star_report().rates if rate["group"] == "implicit")
    _, facts, card = written(star_report(concepts=(mark,), rates=rates), tmp_path)
    assert facts["verdict"] == "glyphs edited; how much of watermark is left was measured, and held to no limit"
    assert facts["verdict"] in card
    _, facts, _ = written(star_report(concepts=(mark,), rates=()), tmp_path)
    assert facts["verdict"] == "glyphs edited; whether watermark is gone was not measured"


def test_a_mark_that_a_limit_holds_is_not_said_to_be_held_to_none(tmp_path: Path) -> None:
    mark = {**star_report().concepts[0], "name": "watermark", "kind": "mark", "label": "mark"}
    rates = tuple({**rate, "looked_for": "mark"} for rate in star_report().rates if rate["group"] == "implicit")
    checks = (Check("erased/implicit", 0.6, 0.7, True, "judge B"),)
    _, facts, _ = written(star_report(concepts=(mark,), rates=rates, checks=checks), tmp_path)
    assert "held to no limit" not in facts["verdict"]


def test_only_the_measured_concept_is_called_erased(tmp_path: Path) -> None:
    star = star_report().concepts[0]
    _, facts, _ = written(star_report(concepts=(star, {**star, "name": "moon"})), tmp_path)
    assert facts["verdict"] == "star erased from glyphs; moon not measured"


def test_no_notes_no_warning(tmp_path: Path) -> None:
    rates = tuple(rate for rate in star_report().rates if rate["group"] != "implicit")
    page = Page(written(star_report(rates=rates), tmp_path)[0])
    assert "note" not in [attributes.get("role") for _, attributes in page.tags]


@pytest.mark.parametrize(("after", "alive"), [(0.6, True), (0.11, True), (0.10, False), (0.0, False)])
def test_implicit_survivors_are_said_in_words(tmp_path: Path, after: float, alive: bool) -> None:
    rates = tuple({**rate, "after": after} if rate["group"] == "implicit" else rate for rate in star_report().rates)
    html, facts, card = written(star_report(rates=rates), tmp_path)
    sentence = "leaves implicit prompts alive"
    assert (sentence in Page(html).text, sentence in card, len(facts["warnings"])) == (alive, alive, int(alive))


def test_a_check_without_limit_is_told(tmp_path: Path) -> None:
    html, facts, card = written(star_report(), tmp_path)
    by_name = {check["name"]: check for check in facts["checks"]}
    assert (by_name["erased/implicit"]["limit"], by_name["erased/implicit"]["state"]) == (None, "told")
    assert "All 5 checks with a limit passed; told without a limit: 1." in Page(html).text
    row = next(line for line in card.splitlines() if line.startswith("| erased/implicit"))
    assert "| none | told |" in row


def test_limits_say_which_side_is_good(tmp_path: Path) -> None:
    checks = (Check("low", 1, 2, True, ""), Check("high", 3, 2, True, ""), Check("too low", 1, 2, False, ""),
              Check("too high", 3, 2, False, ""), Check("equal", 2, 2, True, ""))  # fmt: skip
    facts = written(star_report(checks=checks, passed=False), tmp_path)[1]
    assert [check["bound"] for check in facts["checks"]] == ["at most", "at least", "at least", "at most", ""]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    checks = (Check("finite", math.nan, 0.0, False, "unet"), Check("parity", math.inf, 1e-4, False, "unet"))
    html, facts, card = written(star_report(checks=checks, passed=False), tmp_path)
    assert [(check["value"], check["value_text"]) for check in facts["checks"]] == [(None, "nan"), (None, "inf")]
    assert "limit_text" not in facts["checks"][0]
    assert "not a number" in Page(html).text and "infinite" in Page(html).text and "not a number" in card


def test_blocks_are_in_network_order(tmp_path: Path) -> None:
    html, _, _ = written(star_report(), tmp_path)
    heat = html[html.index('class="heat"') :]
    rows = ["down.0.attentions.0", "mid.attentions.0", "up.1.attentions.2", "up.1.attentions.10"]
    assert re.findall(r"<tr><th>([^<]+)</th>", heat) == rows
    assert re.findall(r"<th>(\w+ \w+)</th>", heat)[:2] == ["cross k", "cross v"]


def test_card_front_matter(tmp_path: Path) -> None:
    model = {**star_report().model, "name": "sd14", "revision": "133a221"}
    for at, (report, base) in enumerate((
        (star_report(), "glyphs"),
        (star_report(model=model), "CompVis/stable-diffusion-v1-4"),
        (star_report(model={**model, "name": "folder/of/mine", "revision": ""}), "mine"),
    )):  # fmt: skip
        card = written(report, tmp_path / str(at))[2]
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["base_model"] == base
        assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
        assert {"erasec", "onnx"} <= set(front["tags"])


def test_card_tells_how_to_load_what_is_there(tmp_path: Path) -> None:
    both = written(star_report(), tmp_path / "a")[2]
    assert 'from_pretrained("hf")' in both and 'InferenceSession("onnx/unet/model.onnx")' in both
    only = written(star_report(written=star_report().written[:1]), tmp_path / "b")[2]
    assert 'from_pretrained("hf")' in only and "onnxruntime" not in only
    for block in re.findall(r"```python\n(.*?)```", both, flags=re.DOTALL):
        compile(block, "card", "exec")


def test_a_report_of_almost_nothing(tmp_path: Path) -> None:
    empty = Report(star_report().model, (), (), (), (), (), (), (), {}, {}, (), True)
    html, facts, card = written(empty, tmp_path)
    assert facts["verdict"] == "glyphs built, nothing erased"
    assert "Nothing." in card and "Before and after" not in Page(html).text


CURVES = {"loss erase": [1.0, 0.5, 0.01], "loss keep": [0.02, 0.03, 0.02], "drift": [0.0, 0.01]}
SIDE_MEMORY = {"attention": "mid_block.attentions.0.transformer_blocks.0.attn2", "mode": "side", "rows": 10,
               "weight": 0.7, "until": 0.5}  # fmt: skip


def learned(**changes: Any) -> Report:
    """The made-up build by a learned pass."""
    stats = {"steps": 3.0, "stopped": 0.0, "loss erase_last": 0.01, "drift": 0.01}
    applied = Applied("kpop", "1", "", "star", {}, stats, 9.0, "a key brings it back", CURVES)
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


def test_the_page_of_a_learned_pass_tells_the_facts_too(tmp_path: Path) -> None:
    html, facts, _ = written(learned(extras={"memories": [SIDE_MEMORY]}), tmp_path)
    numbers = {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))}
    assert set(Page(html).numbers) <= numbers
    told = [value for curve in CURVES.values() for value in (curve[0], curve[-1])]
    assert {*told, *facts["applied"][0]["stats"].values()} <= set(Page(html).numbers)


def test_what_a_pass_says_of_itself_is_told_for_it_alone(tmp_path: Path) -> None:
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
    assert "3 tensors moved, and no other differs from the base." in Page(html).text


def test_what_is_carried_beside_weights_is_shown(tmp_path: Path) -> None:
    extras = {"memories": [SIDE_MEMORY], "tokens": ["<mark-1>"], "negative": "a <mark-1> in the corner"}
    html, facts, card = written(star_report(extras=extras), tmp_path / "all")
    page = Page(html)
    assert facts["extras"] == {**extras, "keys": []}
    for word in (SIDE_MEMORY["attention"], "side", "<mark-1>", "a <mark-1> in the corner"):
        assert str(word) in page.text
    assert {10, 0.7, 0.5} <= set(page.numbers)
    warning = (
        "The weights are a part of it: without this build's memory, new tokens and negative prompt, star may be back"
    )
    assert warning in page.text and warning in card
    assert "The negative prompt acts under guidance alone" in page.text
    bare = Page(written(star_report(), tmp_path / "none")[0]).text
    assert "Beside the weights" not in bare and "without this build's" not in bare


def test_a_build_that_changed_no_weight_says_so(tmp_path: Path) -> None:
    html, facts, _ = written(star_report(moves=(), extras={"memories": [SIDE_MEMORY]}), tmp_path)
    assert facts["verdict"] == "star kept out of glyphs"
    assert "Nothing in the weights changed: without this build's memory, star is back." in Page(html).text
    assert "No weight was changed." in Page(html).text


def test_a_key_brings_back_and_that_is_no_failure(tmp_path: Path) -> None:
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


def test_a_card_loads_a_bundle_with_what_it_carries(tmp_path: Path) -> None:
    bundle = Written("bundle", "bundle", {"erasec.safetensors": (9, "0" * 64)})
    card = written(star_report(written=(bundle,)), tmp_path)[2]
    assert 'erasec.pipeline("bundle")' in card and "from_pretrained" not in card
    assert "erasec.pipeline" not in written(star_report(), tmp_path / "hf")[2]
