"""The command ``erasec audit``: what it finds out by itself, what it writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasec.commands.audit import Request, audit, parse_limits
from erasec.errors import CheckFailed, ErasecError
from erasec.recipe.recipe import from_toml, to_toml


def request(**more: object) -> Request:
    values = {"model": "glyphs", "base": "glyphs", "concept": "star", "probes": ("prompts",), "images": 2}
    return Request(**{**values, **more})  # type: ignore[arg-type]


def test_an_unedited_model_is_not_erased_and_misses_its_gate_after_the_page_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="1 of 1 gates") as caught:
        audit(request(limits={"prompts": 0.1}), tmp_path / "out")
    assert caught.value.exit_code == 3
    facts = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert facts["outcome"] == "failed"
    rates = {row["variant"]: row["rates"] for row in facts["readings"]}
    assert rates["name"]["model"]["hits"] == rates["name"]["base"]["hits"] == 2
    assert rates["name"]["twin"]["hits"] == 0  # the twin of glyphs is known
    assert facts["notion"].startswith("not decided")
    assert facts["alternatives"]["shares"]["star"] == 1.0 and facts["alternatives"]["base_diversity"] > 0
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "What it draws instead" in page and "How it was erased" in page


def test_without_a_base_only_probes_that_need_none_are_run(tmp_path: Path) -> None:
    report = audit(request(base="", probes=("noised",)), tmp_path / "out")
    assert [bool(reading.obstacle) for reading in report.readings] == [True]
    assert report.verdict == "not judged"
    assert any("--base" in note for note in report.notes)


def test_errors_leave_nothing(tmp_path: Path) -> None:
    for wrong in (
        {"suite": "quik", "probes": ()},
        {"probes": ("promts",)},
        {"probes": ("inversion:tokens=99",)},
        {"concept": ""},
        {"concept": "a concept that nobody can see"},
    ):
        with pytest.raises(ErasecError):
            audit(request(**wrong), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_size_of_graphs_is_their_own(tmp_path: Path) -> None:
    graphs = tmp_path / "onnx" / "unet"
    graphs.mkdir(parents=True)
    (graphs / "model.onnx").write_bytes(b"")
    with pytest.raises(ErasecError, match="--size is for models of torch"):
        audit(request(model=str(tmp_path / "onnx"), size=64), tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_a_limit_is_a_share() -> None:
    assert parse_limits(["prompts=0.05", "noised/empty prompt, from t = 595=1"]) == {
        "prompts": 0.05,
        "noised/empty prompt, from t = 595": 1.0,
    }
    for wrong in ("prompts", "prompts=2", "prompts=x", "=0.1"):
        with pytest.raises(ErasecError, match="no limit"):
            parse_limits([wrong])


def test_gates_of_a_recipe_are_read_and_written_again() -> None:
    recipe = from_toml('model = "glyphs"\nerase = ["star"]\n[gate]\nprompts = 0.05\n')
    assert dict(recipe.gate) == {"prompts": 0.05}
    assert from_toml(to_toml(recipe)) == recipe
    with pytest.raises(ErasecError):
        from_toml('model = "glyphs"\n[gate]\nprompts = 5\n')


def test_the_build_around_a_folder_or_a_file_is_found(tmp_path: Path) -> None:
    from erasec.commands.built import find_built

    build = tmp_path / "build"
    for name in ("hf/model_index.json", "ldm/model.safetensors"):
        (build / name).parent.mkdir(parents=True)
        (build / name).write_text("{}")
    (build / "report.json").write_text('{"concepts": [{"name": "star"}]}')
    for path in (build, build / "hf", build / "ldm" / "model.safetensors"):
        assert find_built(str(path)).build == build
    assert find_built(str(build)).path == str(build / "hf")
    assert find_built(str(build / "ldm" / "model.safetensors")).path.endswith("model.safetensors")
    assert find_built(str(tmp_path / "elsewhere")).build is None


def test_a_probe_of_a_file_is_run_beside_registered_ones(tmp_path: Path, root: Path) -> None:
    report = audit(request(probes=(f"{root / 'examples' / 'my_probe.py'}:Shouted",)), tmp_path / "out")
    (reading,) = report.readings
    assert (reading.probe, reading.variant) == ("shouted", "capitals")
    assert set(reading.rates) == {"model", "control", "base", "twin", "random"}
    assert "shouted" in (tmp_path / "out" / "audit.html").read_text(encoding="utf-8").lower()
