"""The metadata at the head of a model card, by which the hub lists, links and gates a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.documents import read_text
from erasec.errors import words
from erasec.family import HUB
from erasec.reporting.facts import GROUPS, facts_of

if TYPE_CHECKING:
    from erasec.reporting.report import Report

CARD = "README.md"
# What the fields of a licence look like; anything else in a card of somebody else is left out.
LICENSE = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"),
    "license_name": re.compile(r"[\w][\w.+-]{0,60}", re.ASCII),
    "license_link": re.compile(r"(https://[!-~]{1,200}|LICENSE(\.md|\.txt)?)"),
}
PROMPT = (
    "This repository holds files that can undo the erasure ({what}). Anyone who has them can bring {concepts} back. "
    "Its owners grant each access by hand."
)
PROMISE = "I will use these files for research on erasure, and not to bring back what was erased"


def front_matter(report: Report) -> str:
    """The YAML for the card of a build. The base is named where it is a model of the hub: any other name would be
    refused there, or link to a stranger's model."""
    from huggingface_hub import EvalResult, ModelCardData

    facts = facts_of(report)
    targets = dict.fromkeys(written.target for written in report.written if written.target != "hf")
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="erasec",
            dataset_name=GROUPS[group][0],
            dataset_config=group,
            metric_type="hit-rate",
            metric_name=f"share of pictures that show what was looked for, {side} the edit",
            metric_value=round(rates[side], 4),
        )
        for group, rates in facts["summary"].items()
        for side in ("before", "after")
    ]
    fields: dict[str, Any] = dict(report.base.license) if report.base else {}
    if report.model["revision"]:
        name = report.model["name"]
        fields |= {"base_model": HUB.get(name, name), "base_model_relation": "finetune"}
    if inside := [item["path"] for item in report.undoing if item["inside"]]:
        concepts = words(concept["name"] for concept in report.concepts) or "what was erased"
        fields |= {
            "extra_gated_prompt": _line(PROMPT.format(what=words(inside), concepts=concepts)),
            "extra_gated_fields": {PROMISE: "checkbox"},
        }
    data = ModelCardData(
        model_name=_line(facts["verdict"]) if results else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["erasec", "concept-erasure", f"erasec-{report.outcome.replace(' ', '-')}", *targets],
        eval_results=results or None,
        **fields,
    )
    text: str = data.to_yaml()
    return text


def _line(text: str) -> str:
    """``text`` on one line: a line of its own could end the metadata."""
    return " ".join(text.split())


def read_license(folder: Path) -> dict[str, str]:
    """The licence that the card of a model folder states, as fields of a card; empty where it states none."""
    from huggingface_hub.repocard import metadata_load

    try:
        read_text(folder / CARD)  # which refuses a file that is no text, or too large
        stated = metadata_load(folder / CARD) or {}
    except Exception:  # a card is written by hand, and its reader raises the errors of its own reader of YAML
        return {}
    fields = {name: str(stated[name]) for name in LICENSE if isinstance(stated.get(name), str)}
    kept = {name: text for name, text in fields.items() if LICENSE[name].fullmatch(text)}
    return kept if "license" in kept else {}
