"""Bundles that somebody changed on purpose, with every digest, the report and the recipe written again to fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged import describe_again, edit_json

from erasec.cli.app import app
from erasec.commands.verify import verify
from erasec.errors import CHECK_FAILED

onnx = pytest.importorskip("onnx")


def written(target: str, path: str) -> dict[str, Any]:
    return {"target": target, "path": path, "bytes": 1, "files": {}}


def set_targets(out: Path, *targets: str) -> None:
    """Write these targets into the recipe."""
    recipe = (out / "recipe.toml").read_text()
    changed = re.sub(r"^targets = \[[^]]*\]", lambda _: f"targets = {json.dumps(targets)}", recipe, flags=re.MULTILINE)
    (out / "recipe.toml").write_text(changed)


def keep(out: Path, *folders: str) -> None:
    """Remove the folders of all other targets, also from the report and the recipe."""

    def change(report: Any) -> None:
        report["written"] = [item for item in report["written"] if item["path"] in folders]
        report["undoing"] = [item for item in report["undoing"] if item["path"] in folders]

    for name in {"ldm", "lora", "edit", "onnx"} - {*folders}:
        shutil.rmtree(out / name)
    edit_json(out / "report.json", change)
    set_targets(out, *folders)


def states(out: Path) -> dict[str, str]:
    return {finding.what: finding.state for finding in verify(out).findings}


def test_a_bundle_that_is_described_again_is_verified_as_before(copied: Path) -> None:
    """The negative control of this module: what these tests rewrite is not what makes a bundle wrong."""
    keep(copied, "hf", "onnx")
    describe_again(copied)
    assert verify(copied).wrong == "" and states(copied)["onnx"] == "verified"


def test_a_class_in_the_bundle_is_never_run(copied: Path, tmp_path: Path) -> None:
    """Also where the report names it as what wrote a folder."""
    keep(copied, "hf")
    evil, marker = copied / "evil" / "evil.py", tmp_path / "marker"
    evil.parent.mkdir()
    evil.write_text(f"open({str(marker)!r}, 'w').close()")
    name = f"{evil}:T"
    set_targets(copied, "hf", name)
    edit_json(copied / "report.json", lambda report: report["written"].append(written(name, "evil")))
    describe_again(copied)
    assert "evil" in verify(copied).wrong and not marker.exists()
    edit_json(copied / "report.json", lambda report: report["written"][1].update(target="evil"))
    describe_again(copied)
    assert verify(copied).wrong == "" and states(copied)["evil"] == "not verified" and not marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda items: items.append(written("hf", "onnx")), "describes the folder onnx as that of the target hf"),
        (lambda items: items.append(written("onnx", "onnx")), "does not name the targets that report.json describes"),
        (lambda items: items.extend([written("onnx", "onnx")] * 2), "describes the target onnx twice"),
    ],
)
def test_a_folder_that_no_target_compares_is_not_accepted(
    copied: Path, change: Callable[[list[Any]], None], words: str
) -> None:
    keep(copied, "hf", "onnx")
    set_targets(copied, "hf")

    def describe(report: Any) -> None:
        report["written"] = report["written"][:1]
        change(report["written"])

    edit_json(copied / "report.json", describe)
    describe_again(copied)
    assert words in verify(copied).wrong


def test_a_target_of_the_recipe_that_is_not_there_is_wrong(copied: Path) -> None:
    keep(copied, "hf", "onnx")
    set_targets(copied, "hf", "onnx", "ldm")
    describe_again(copied)
    assert "names a target that report.json does not describe" in verify(copied).wrong


def test_a_folder_of_a_class_in_a_python_file_is_not_verified_as_another_target(copied: Path) -> None:
    keep(copied, "hf", "onnx")
    set_targets(copied, "hf", "mine.py:Mine")
    describe_again(copied)
    assert states(copied)["onnx"] == "not verified"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda report: report["undoing"].append({"path": "hf/more", "inside": True, "undoes": "x"}),
            "report.json cannot be read: undoing.0.path",
        ),
        (
            lambda report: report["undoing"].append({"path": "more", "inside": True, "undoes": "x"}),
            "more is there, and report.json does not describe it",
        ),
        (lambda report: report["model"].update(revision="../../x"), "report.json cannot be read: model.revision"),
    ],
)
def test_paths_that_the_report_names_stay_in_their_place(
    copied: Path, change: Callable[[Any], None], words: str
) -> None:
    keep(copied, "hf")
    (copied / "more").touch()
    edit_json(copied / "report.json", change)
    describe_again(copied)
    assert words in verify(copied).wrong


def test_a_graph_that_the_manifest_of_the_folder_leaves_out_is_compared(copied: Path) -> None:
    keep(copied, "hf", "onnx")
    edit_json(copied / "onnx" / "erasec.json", lambda content: content["graphs"].pop("unet"))
    describe_again(copied)
    assert "onnx does not hold the merged weights: graphs that erasec.json" in verify(copied).wrong


@pytest.mark.parametrize("name", ["unet2/model.onnx", "unet/other.onnx_data", "more.onnx"])
def test_a_file_that_the_target_does_not_write_is_wrong(copied: Path, name: str) -> None:
    keep(copied, "hf", "onnx")
    (copied / "onnx" / name).parent.mkdir(exist_ok=True)
    shutil.copy(copied / "onnx" / "unet" / "model.onnx", copied / "onnx" / name)
    describe_again(copied)
    assert verify(copied).wrong.endswith(f"the first is {name}")


def add_constant(out: Path, side: int, key: str = "") -> None:
    """Add a node to the ONNX graph of a UNet that holds a matrix; ``key`` is what the folder says of its graph."""
    import numpy as np

    file = out / "onnx" / "unet" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    value = onnx.numpy_helper.from_array(np.ones((side, side), np.float32))
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["old"], name="old", value=value))
    file.write_bytes(model.SerializeToString())
    if key:
        edit_json(out / "onnx" / "erasec.json", lambda content: content["graphs"]["unet"].update(graph=key))
    describe_again(out)


def test_weights_that_are_constants_of_nodes_are_wrong(copied: Path) -> None:
    keep(copied, "hf", "onnx")
    add_constant(copied, 200, "ab" * 32)
    assert "constants in nodes of unet that are as large as a weight; the first is old" in verify(copied).wrong


def test_other_nodes_of_the_same_exporter_are_wrong_and_those_of_another_are_not_verified(copied: Path) -> None:
    keep(copied, "hf", "onnx")
    add_constant(copied, 2)
    assert "graph with other nodes than erasec exports" in verify(copied).wrong
    edit_json(copied / "onnx" / "erasec.json", lambda content: content["graphs"]["unet"].update(graph="ab" * 32))
    describe_again(copied)
    assert verify(copied).wrong == "" and states(copied)["onnx"] == "not verified"


def test_data_outside_of_the_bundle_are_not_read(copied: Path) -> None:
    """They would never end."""
    from typer.testing import CliRunner

    keep(copied, "hf", "onnx")
    file = copied / "onnx" / "unet" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    for item in model.graph.initializer[0].external_data:
        item.value = {"location": "/dev/zero", "length": "9" * 18}.get(item.key, item.value)
    file.write_bytes(model.SerializeToString())
    describe_again(copied)
    result = CliRunner().invoke(app, ["verify", str(copied)])
    assert result.exit_code == CHECK_FAILED and "'/dev/zero' is no file of the folder unet" in result.stderr


def test_a_folder_that_is_a_link_is_wrong(copied: Path, tmp_path: Path) -> None:
    keep(copied, "hf")
    shutil.move(copied / "hf" / "unet", tmp_path / "unet")
    (copied / "hf" / "unet").symlink_to(tmp_path / "unet")
    describe_again(copied)
    assert "hf/unet/ is there, and is not listed" in verify(copied).wrong
