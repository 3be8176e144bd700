"""Builds for tests of ``erasec verify``, and what somebody does who changes a build and writes all digests again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erasec.checkpoint import manifest
from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save_tensors
from erasec.commands import build, plan
from erasec.recipe.recipe import Limits, Recipe
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import PROVENANCE
from erasec.reporting.report import Report

QUIET = Limits(pictures=0)
TARGETS = ("ldm", "lora", "edit", "onnx")


def make(model: Path, out: Path, sign: Path | None = None, **fields: Any) -> Report:
    recipe = Recipe(**{"model": str(model), "erase": ("church",), "checks": QUIET, "device": "cpu", **fields})
    return build.run(plan.make_plan(recipe, out, sign=sign))


def sign_over(out: Path) -> None:
    """Write the manifest again, as somebody would who changed files: only signatures, and what belongs together, are
    left to show it."""
    (out / manifest.FILE).unlink()
    manifest.write(out)


def replace_digests(out: Path, *names: str) -> None:
    """Write the digests of files anew into the report, the card and all else that names them."""
    for name in names:
        old, new = manifest.read(out)[0].files[name].sha256, file_digest(out / name)
        _replace(out, old, new)
    report = json.loads((out / "report.json").read_text())
    records = manifest.records(out, [f"{item['path']}/{name}" for item in report["written"] for name in item["files"]])
    _replace(out, report["digest"], manifest.combined_digest(records))
    statement = json.loads((out / PROVENANCE).read_text())
    for item in statement["subject"]:
        item["digest"]["sha256"] = file_digest(out / item["name"])
    (out / PROVENANCE).write_text(json.dumps(statement))
    sign_over(out)


def _replace(out: Path, old: str, new: str) -> None:
    for name in ("report.json", "README.md", "report.html", BOM):
        (out / name).write_text((out / name).read_text().replace(old, new))


def change_tensor(file: Path, key: str) -> None:
    entries, metadata = read_header(file)
    tensors = {name: read_tensor(entry) for name, entry in entries.items()}
    tensors[key].view(-1)[0] += 1
    save_tensors(file, tensors, metadata)


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def describe_again(out: Path) -> None:
    """Write into report, card, bill of materials and provenance what lies in the folders that the report names."""
    report, bill = (json.loads((out / name).read_text()) for name in ("report.json", BOM))
    old = report["digest"]
    for item in report["written"]:
        item["files"] = {
            name: record.model_dump()
            for name, record in manifest.records(out / item["path"], manifest.contents(out / item["path"])).items()
        }
    files = {f"{item['path']}/{name}": file for item in report["written"] for name, file in item["files"].items()}
    report["digest"] = manifest.combined_digest(manifest.records(out, files))
    (out / "report.json").write_text(json.dumps(report))
    bill["components"] = [item for item in bill["components"] if item["type"] != "file"] + [
        {
            "type": "file",
            "name": name,
            "bom-ref": f"file:{name}",
            "hashes": [{"alg": "SHA-256", "content": file["sha256"]}],
        }
        for name, file in files.items()
    ]
    references = {item["bom-ref"] for item in bill["components"]}
    for item in bill["dependencies"]:
        item["dependsOn"] = [name for name in item.get("dependsOn", []) if name in references]
    (out / BOM).write_text(json.dumps(bill))
    _replace(out, old, report["digest"])
    statement = json.loads((out / PROVENANCE).read_text())
    statement["subject"] = [
        {"name": name, "digest": {"sha256": file_digest(out / name)}}
        for name in manifest.contents(out)
        if name != PROVENANCE
    ]
    (out / PROVENANCE).write_text(json.dumps(statement))
    sign_over(out)
