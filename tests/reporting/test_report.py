"""The report: the same facts in all three files, nothing fetched or hidden, and no claim without a measurement."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from sample_report import Page, leaves, star_report, written

from erasec.base import Check
from erasec.model.loading import load
from erasec.reporting import collect
from erasec.reporting.front_matter import read_license
from erasec.reporting.read import outcome as read_outcome
from erasec.reporting.read import read_report
from erasec.reporting.report import ArtifactRecord, BaseRecord, Report, write_report


def test_page_and_json_have_the_same_facts(tmp_path: Path) -> None:
    html, facts, _ = written(star_report(pairs=star_report().pairs[:3]), tmp_path)
    page = Page(html)
    numbers = {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))}
    assert set(page.numbers) <= numbers
    assert len(page.numbers) > 60
    shown = set(page.numbers)
    for part in ("checks", "rates", "seconds", "summary", "published"):
        floats = {leaf for leaf in leaves(facts[part]) if isinstance(leaf, float)}
        assert floats and floats <= shown, part
    assert set(facts["applied"][0]["stats"].values()) <= shown
    assert {move["change"] for move in facts["moves"]} <= shown
    groups = ("name", "synonym", "implicit", "keep")  # the page calls them by their titles
    texts = {leaf for leaf in leaves({**facts, "schema": ""}) if isinstance(leaf, str) and leaf not in groups}
    assert len(texts) > 60
    assert [text for text in sorted(texts) if text not in page.everything] == []


def test_the_figures_of_papers_need_a_kind_and_both_rates(tmp_path: Path) -> None:
    report = star_report()
    assert {"UA", "IRA"} == set(written(report, tmp_path / "a")[1]["published"])
    unkept = replace(report, rates=tuple(rate for rate in report.rates if rate["group"] != "keep"))
    assert written(unkept, tmp_path / "b")[1]["published"] == {}
    mixed = replace(report, concepts=(*report.concepts, {**report.concepts[0], "kind": "style"}))
    assert written(mixed, tmp_path / "c")[1]["published"] == {}


def test_the_card_carries_the_notice_of_a_bundled_model(tmp_path: Path) -> None:
    record = collect.base_record(load("emoji"))
    assert "CC BY 4.0" in record.notice
    _, _, card = written(star_report(base=record), tmp_path / "a")
    assert "## Notice" in card and record.notice in card
    assert collect.base_record(load("glyphs")).notice == ""
    assert "## Notice" not in written(star_report(), tmp_path / "b")[2]


def test_a_number_of_another_report_is_noticed(tmp_path: Path) -> None:
    """Negative control of the test above."""
    page = Page(written(star_report(seconds={"load": 987.125}), tmp_path / "a")[0])
    facts = written(star_report(), tmp_path / "b")[1]
    assert set(page.numbers) - {float(leaf) for leaf in leaves(facts) if isinstance(leaf, (int, float))} == {987.125}


def with_prompt_file(category: str = "sky") -> Report:
    rows = [
        {
            "category": name,
            "looked_for": "star",
            "images": images,
            "before": 0.815,
            "before_interval": [0.6215, 0.9225],
            "after": 0.0625,
            "after_interval": [0.0125, 0.1875],
        }
        for name, images in (("", 40), (category, 16))
    ]
    file = {"file": "night", "sha256": "cd" * 32, "prompts": 400, "used": 40, "rows": rows}
    return star_report(prompt_files=(file, {**file, "file": "unseen", "rows": []}))


def test_a_prompt_file_has_a_table_by_category_with_intervals(tmp_path: Path) -> None:
    html, facts, card = written(with_prompt_file(), tmp_path)
    page = Page(html)
    assert "Prompt file night" in page.text and "40 of 400 prompts were used" in page.text
    assert {0.815, 0.6215, 0.9225, 0.0625, 0.0125, 0.1875} <= set(page.numbers)
    assert facts["prompt_files"][0]["rows"][1]["category"] == "sky"
    percent = "81.5\u00a0% (62.2\u00a0% to 92.2\u00a0%) | 6.2\u00a0% (1.2\u00a0% to 18.8\u00a0%) |"
    assert f"| all | star | 40 | {percent}" in card and f"| sky | star | 16 | {percent}" in card
    # What no judge could see has pictures, and no table.
    assert "Prompt file unseen" not in page.text and facts["prompt_files"][1]["rows"] == []
    plain, _, card = written(star_report(), tmp_path / "plain")
    assert "Prompt file" not in Page(plain).text and "Prompts of the file" not in card


def test_a_category_of_a_prompt_file_is_text(tmp_path: Path) -> None:
    html, _, card = written(with_prompt_file("<b>a</b> | *b*"), tmp_path)
    assert "<b>a</b>" not in html and "<b>a</b> | *b*" in Page(html).text
    assert "&lt;b&gt;a&lt;/b&gt; \\| \\*b\\*" in card


def test_same_report_same_bytes(tmp_path: Path) -> None:
    names = ("report.html", "report.json", "README.md")
    write_report(star_report(), tmp_path / "a")
    write_report(star_report(), tmp_path / "b")
    write_report(star_report(notes=("another",)), tmp_path / "c")
    for name in names:
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes()
        assert first != (tmp_path / "c" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)


def test_a_passed_build_says_what_was_erased(tmp_path: Path) -> None:
    html, facts, card = written(star_report(), tmp_path)
    assert facts["verdict"] == "star erased from glyphs"
    assert "✓ passed" in Page(html).text and "rejected" not in Page(html).text.split("Checks")[0]
    assert "**Passed**" in card and "Rejected" not in card


def test_a_failed_build_says_rejected(tmp_path: Path) -> None:
    finite, by_name, *rest = star_report().checks
    checks = (finite, replace(by_name, value=0.4, passed=False), *rest)
    html, facts, card = written(star_report(checks=checks), tmp_path)
    assert facts["verdict"] == "build rejected: erased/name failed"
    assert facts["passed"] is False and facts["failed"] == ["erased/name"]
    page = Page(html)
    assert "✕ rejected 1 of 6 checks failed: erased/name." in page.text
    assert "✓ passed" not in page.text.split("Before and after")[0] and "erased from" not in page.text
    assert "**Rejected**: erased/name failed." in card and "**Passed**" not in card


@pytest.mark.parametrize("changes", [{"rates": ()}, {"checks": ()}, {"judged": ()}])
def test_nothing_is_called_erased_that_was_not_measured(tmp_path: Path, changes: dict[str, Any]) -> None:
    note = "no judge: erasure was not measured"
    html, facts, card = written(star_report(**changes, notes=(note,)), tmp_path)
    assert facts["verdict"] == "glyphs edited; whether star is gone was not measured"
    assert note in Page(html).text.split("Before and after")[0]
    assert note in card and "erased from" not in html + card


def test_a_mark_without_a_limit_is_called_measured(tmp_path: Path) -> None:
    """A mark comes with prompts that do not name it: its rates are implicit alone."""
    mark = {**star_report().concepts[0], "name": "watermark", "kind": "mark", "label": "mark"}
    rates = tuple({**rate, "looked_for": "mark"} for rate in star_report().rates if rate["group"] == "implicit")
    _, facts, card = written(star_report(concepts=(mark,), rates=rates, judged=("watermark",)), tmp_path)
    assert facts["verdict"] == "glyphs edited; how much of watermark is left was measured, without a limit"
    assert facts["verdict"] in card
    _, facts, _ = written(star_report(concepts=(mark,), rates=()), tmp_path)
    assert facts["verdict"] == "glyphs edited; whether watermark is gone was not measured"


def test_a_mark_with_a_limit_is_not_called_measured_without_one(tmp_path: Path) -> None:
    mark = {**star_report().concepts[0], "name": "watermark", "kind": "mark", "label": "mark"}
    rates = tuple({**rate, "looked_for": "mark"} for rate in star_report().rates if rate["group"] == "implicit")
    checks = (Check("erased/implicit", 0.6, 0.7, True, "judge B"),)
    _, facts, _ = written(star_report(concepts=(mark,), rates=rates, checks=checks, judged=("watermark",)), tmp_path)
    assert "without a limit" not in facts["verdict"]


def test_only_the_measured_concept_is_called_erased(tmp_path: Path) -> None:
    star = star_report().concepts[0]
    _, facts, _ = written(star_report(concepts=(star, {**star, "name": "moon"})), tmp_path)
    assert facts["verdict"] == "star erased from glyphs; moon not measured"


@pytest.mark.parametrize(("after", "alive"), [(0.6, True), (0.11, True), (0.10, False), (0.0, False)])
def test_a_high_implicit_hit_rate_adds_a_warning(tmp_path: Path, after: float, alive: bool) -> None:
    rates = tuple({**rate, "after": after} if rate["group"] == "implicit" else rate for rate in star_report().rates)
    html, facts, card = written(star_report(rates=rates), tmp_path)
    sentence = "Implicit prompts still work"
    assert (sentence in Page(html).text, sentence in card, len(facts["warnings"])) == (alive, alive, int(alive))


def test_a_check_without_limit_is_reported(tmp_path: Path) -> None:
    html, facts, card = written(star_report(), tmp_path)
    by_name = {check["name"]: check for check in facts["checks"]}
    assert (by_name["erased/implicit"]["limit"], by_name["erased/implicit"]["state"]) == (None, "reported")
    assert "All 5 checks with a limit passed; reported without a limit: 1." in Page(html).text
    row = next(line for line in card.splitlines() if line.startswith("| erased/implicit"))
    assert "| none | reported |" in row


def test_limits_say_which_side_is_good(tmp_path: Path) -> None:
    checks = (
        Check("low", 1, 2, True, ""),
        Check("high", 3, 2, True, ""),
        Check("too low", 1, 2, False, ""),
        Check("too high", 3, 2, False, ""),
        Check("equal", 2, 2, True, ""),
    )
    facts = written(star_report(checks=checks), tmp_path)[1]
    assert [check["bound"] for check in facts["checks"]] == ["at most", "at least", "at least", "at most", ""]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    checks = (Check("finite", math.nan, 0.0, False, "unet"), Check("parity", math.inf, 1e-4, False, "unet"))
    html, facts, card = written(star_report(checks=checks), tmp_path)
    assert [(check["value"], check["value_text"]) for check in facts["checks"]] == [(None, "nan"), (None, "inf")]
    assert "limit_text" not in facts["checks"][0]
    assert "not a number" in Page(html).text and "infinite" in Page(html).text and "not a number" in card


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_front_matter(tmp_path: Path) -> None:
    """The base is named where it is a model of the hub: any other name would link to a stranger's model."""
    model = {**star_report().model, "name": "sd14", "revision": "133a221"}
    for at, (report, base) in enumerate(
        (
            (star_report(), None),
            (star_report(model=model), "CompVis/stable-diffusion-v1-4"),
            (star_report(model={**model, "name": "our-team/model"}), "our-team/model"),
            (star_report(model={**model, "name": "folder/of/mine", "revision": ""}), None),
        )
    ):
        front = front_matter(written(report, tmp_path / str(at))[2])
        assert front.get("base_model") == base
        assert front.get("base_model_relation") == (base and "finetune")
        assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
        assert {"erasec", "onnx", "erasec-passed"} <= set(front["tags"])


def test_the_rates_of_the_card_are_those_of_the_report(tmp_path: Path) -> None:
    _, facts, card = written(star_report(), tmp_path / "a")
    data = ModelCard(card).data
    values = {(item.dataset_config, item.metric_name.split(", ")[1]): item.metric_value for item in data.eval_results}
    assert values == {
        (group, f"{side} the edit"): round(rates[side], 4)
        for group, rates in facts["summary"].items()
        for side in ("before", "after")
    }
    assert len(values) == 8 and data.model_name == facts["verdict"]
    unseen = front_matter(written(star_report(rates=(), judged=()), tmp_path / "b")[2])
    assert "model-index" not in unseen and "erasec-not-judged" in unseen["tags"]


def test_the_card_asks_for_a_gate_where_something_can_undo_the_erasure(tmp_path: Path) -> None:
    undoing = ({"path": "edit", "inside": True, "undoes": "x"}, {"path": "a.key", "inside": False, "undoes": "y"})
    front = front_matter(written(star_report(undoing=undoing), tmp_path / "a")[2])
    assert "(edit)" in front["extra_gated_prompt"] and "bring star back" in front["extra_gated_prompt"]
    assert [*front["extra_gated_fields"].values()] == ["checkbox"]
    apart = front_matter(written(star_report(undoing=undoing[1:]), tmp_path / "b")[2])
    assert not {name for name in apart if name.startswith("extra_gated")}


def test_a_name_cannot_end_the_front_matter(tmp_path: Path) -> None:
    evil = "star\n---\nlicense: mit\n# erased"
    concept = {**star_report().concepts[0], "name": evil}
    undoing = ({"path": "edit", "inside": True, "undoes": "x"},)
    report = star_report(concepts=(concept,), judged=(evil,), undoing=undoing)
    front = front_matter(written(report, tmp_path)[2])
    assert "license" not in front and front["model-index"][0]["name"].startswith("star --- license: mit")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# A model", {"license": "creativeml-openrail-m"}),
        (
            "---\nlicense: other\nlicense_name: our-terms\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "our-terms", "license_link": "LICENSE.md"},
        ),
        ("---\nlicense: [mit]\nlicense_name: x\n---\n", {}),
        ("---\nlicense: 'no\n license'\n---\n", {}),
        ("---\nlicense: mit\nlicense_link: 'javascript:x'\n---\n", {"license": "mit"}),
        ("---\n: {\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("# No metadata", {}),
        (None, {}),
    ],
)
def test_the_licence_of_the_base_is_that_of_its_card(
    tmp_path: Path, card: str | None, expected: dict[str, str]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == expected
    base = BaseRecord("folder", "base", "StableDiffusionPipeline", license=read_license(tmp_path))
    front = front_matter(written(star_report(base=base), tmp_path / "out")[2])
    assert {name: text for name, text in front.items() if name.startswith("license")} == expected


def test_the_card_shows_how_to_load_each_artifact(tmp_path: Path) -> None:
    both = written(star_report(), tmp_path / "a")[2]
    assert 'from_pretrained("hf")' in both and 'InferenceSession("onnx/unet/model.onnx")' in both
    only = written(star_report(written=star_report().written[:1]), tmp_path / "b")[2]
    assert 'from_pretrained("hf")' in only and "onnxruntime" not in only
    for block in re.findall(r"```python\n(.*?)```", both, flags=re.DOTALL):
        compile(block, "card", "exec")


def test_the_card_loads_the_base_of_a_lora_from_the_hub_at_its_revision(tmp_path: Path) -> None:
    model = {**star_report().model, "name": "sd14", "revision": "133a221"}
    lora = ArtifactRecord("lora", "lora", {"pytorch_lora_weights.safetensors": (9, "0" * 64)})
    base = BaseRecord("hub", "CompVis/stable-diffusion-v1-4", "StableDiffusionPipeline", "fp16")
    card = written(star_report(model=model, base=base, written=(lora,)), tmp_path)[2]
    call = 'DiffusionPipeline.from_pretrained("CompVis/stable-diffusion-v1-4", revision="133a221", variant="fp16")'
    assert f'pipe = {call}\npipe.load_lora_weights("lora")' in card


def test_the_card_of_a_single_file_alone_needs_no_configs(tmp_path: Path) -> None:
    ldm = ArtifactRecord("ldm", "ldm", {"model.safetensors": (9, "0" * 64)})
    base = BaseRecord("folder", "base", "StableDiffusionXLPipeline")
    for number, (artifacts, more) in enumerate((((ldm,), ""), ((star_report().written[0], ldm), ', config="hf"'))):
        card = written(star_report(base=base, written=artifacts), tmp_path / str(number))[2]
        assert f'pipe = StableDiffusionXLPipeline.from_single_file("ldm/model.safetensors"{more})' in card
    alone = replace(ldm, files={"transformer.safetensors": (9, "0" * 64)})
    card = written(star_report(base=base, written=(star_report().written[0], alone)), tmp_path / "alone")[2]
    assert 'kind.from_single_file("ldm/transformer.safetensors", config="hf", subfolder="transformer")' in card
    assert "StableDiffusionXLPipeline.from_single_file" not in card


def test_the_card_names_the_variant_and_the_sizes_that_graphs_take(tmp_path: Path) -> None:
    hf, onnx = star_report().written[:2]
    card = written(star_report(written=(replace(hf, variant="fp16"), replace(onnx, multiple=64))), tmp_path / "a")[2]
    assert 'from_pretrained("hf", variant="fp16")' in card
    assert "The graphs in onnx take heights and widths that are multiples of 64 pixels." in card
    plain = written(star_report(written=(hf, onnx)), tmp_path / "b")[2]
    assert 'from_pretrained("hf")' in plain and "multiples of" not in plain


def test_a_report_of_almost_nothing(tmp_path: Path) -> None:
    empty = Report(star_report().model, (), (), (), (), (), (), (), {}, {}, (), True)
    html, facts, card = written(empty, tmp_path)
    assert facts["verdict"] == "glyphs built, nothing erased"
    assert "Nothing." in card and "Before and after" not in Page(html).text


def test_a_card_loads_a_bundle_with_what_it_carries(tmp_path: Path) -> None:
    bundle = ArtifactRecord("bundle", "bundle", {"erasec.safetensors": (9, "0" * 64)})
    card = written(star_report(written=(bundle,)), tmp_path)[2]
    assert 'erasec.pipeline("bundle")' in card and "from_pretrained" not in card
    assert "erasec.pipeline" not in written(star_report(), tmp_path / "hf")[2]


def test_a_build_that_nothing_could_see_never_reads_as_passed(tmp_path: Path) -> None:
    """Page, facts and card say that it was not judged; a rejected build is rejected, whatever a judge saw."""
    html, facts, card = written(star_report(judged=()), tmp_path / "unseen")
    assert (facts["outcome"], facts["passed"], facts["unjudged"]) == ("not judged", False, ["star"])
    header = html.split("<body>")[1].split("</header>")[0]
    assert "? not judged" in header and '<h1 class="unjudged">' in header and "passed" not in header.lower()
    assert "**Not judged**: no judge could see star" in card and "**Passed**" not in card
    assert read_outcome(read_report(tmp_path / "unseen")) == "not judged"
    finite, by_name, *rest = star_report().checks
    failed = star_report(checks=(finite, replace(by_name, passed=False), *rest), judged=())
    assert written(failed, tmp_path / "failed")[1]["outcome"] == failed.outcome == "rejected"
    seen = star_report()
    assert (seen.outcome, seen.passed, seen.unjudged) == ("passed", True, ())
    assert written(seen, tmp_path / "seen")[1]["outcome"] == "passed"


@pytest.mark.parametrize(
    ("old", "outcome"),
    [
        ({"passed": True}, "passed"),
        ({"passed": False}, "rejected"),
        ({}, "rejected"),
        ({"passed": True, "outcome": "not judged"}, "not judged"),
        ({"passed": True, "outcome": "perfect"}, "rejected"),
    ],
)
def test_reports_without_an_outcome_are_still_read(tmp_path: Path, old: dict[str, Any], outcome: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert read_outcome(read_report(tmp_path)) == outcome


def test_the_estimated_time_stands_beside_the_measured_one(tmp_path: Path) -> None:
    html, facts, _ = written(star_report(estimated={"solve": [240.0, 540.0], "never": [1.0, 2.0]}), tmp_path / "a")
    assert "estimated: about 4 to 9 minutes" in Page(html).text
    assert "about 1 to 2 s" not in Page(html).text  # of a step that the build did not have
    assert facts["estimated"]["solve"] == [240.0, 540.0]
    html, facts, _ = written(star_report(), tmp_path / "b")
    assert "estimated: about" not in Page(html).text
    assert facts["estimated"] == {}


def test_the_reach_of_an_attacker_is_drawn_and_called_no_proof(tmp_path: Path) -> None:
    curve = {"concept": "star", "radii": [0.0, 1.0, 2.0], "residual": [1.0, 0.4, 0.1], "recovered": [0.0, 0.6, 0.9]}
    page, facts, _ = written(star_report(reach=(curve,)), tmp_path / "with")
    assert facts["reach"] == [curve]
    assert "<h3>Reach</h3>" in page
    assert "star goes from 1 to 0.1, a linear scale" in page
    assert "no proof about pictures, which only erasec audit attacks" in page
    page, facts, _ = written(star_report(), tmp_path / "without")
    assert facts["reach"] == []
    assert "<h3>Reach</h3>" not in page
