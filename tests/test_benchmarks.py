"""The benchmarks compare like with like, and write what they promise; at sizes where their times mean nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

PARTS = {"seconds", "cpu", "peak_mb", "error", "worst_error", "worst_site"}
STEPS = {"copy", "copy_digest", "in_place", "apply", "link", "copy_unet"}
STEPS |= {"copy_single", "copy_digest_single", "in_place_single", "apply_single"}


@pytest.fixture
def load(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A module of tests/benchmarks by name."""
    monkeypatch.syspath_prepend(root / "tests" / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parent / "benchmarks").glob("*.py")))
def test_every_benchmark_imports(load, name: str):
    """Most are too long for the tests, and one that no longer starts would go unnoticed."""
    assert load(name).__doc__


@pytest.fixture
def scale(load) -> ModuleType:
    return load("closed_form_scale")


@pytest.fixture
def few(scale: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of few tokens, so that the naive ones take no time."""
    monkeypatch.setattr(scale, "PROMPTS", 2)
    monkeypatch.setattr(scale, "TOKENS", 9)


def by_pass(scale: ModuleType, case, weights: list[torch.Tensor]) -> torch.Tensor:
    """M of the pass's own code, float64."""
    energy = sum(weight.T @ weight for weight in weights)
    sums = case.sums({"context.energy": energy})
    joined = scale.solver.combine_systems(scale.unpack_system(sums[name], "context") for name in sorted(sums) if name)
    keep = torch.cat([joined.keep, sums[""].get("context.prior", joined.keep[:0])])
    asked = scale.System(joined.source, joined.shift, keep, joined.lost)
    return case.method.solve_system(asked, "context", sums).matrix()


@pytest.mark.parametrize(
    "row", ["uce:1", "uce:5", "uce:40", "rece:1", "mace:1", "mace:2", "trce.remap:6", "speed:1", "speed:5"]
)
@pytest.mark.usefixtures("few")
def test_in_float64_the_naive_form_and_the_pass_are_the_same_edit(scale: ModuleType, row: str) -> None:
    name, count = row.split(":")
    case = scale.CASES[name](int(count), 24)
    weights = [
        torch.randn(rows, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) for rows in (8, 40)
    ]
    matrix = by_pass(scale, case, weights)
    for weight, naive in zip(weights, case.naive(weights)(), strict=True):
        edit = (naive - weight).norm()
        assert edit > 0.01 * weight.norm()
        assert (weight @ matrix - naive).norm() < 1e-8 * edit
    # Another seed of the states, or the edit of another pass, is not the same.
    other = scale.CASES["uce"](7, 24).naive(weights)()
    assert (weights[0] @ matrix - other[0]).norm() > 1e-2 * (other[0] - weights[0]).norm()


def test_products_of_rows_and_of_stacks_of_rows_are_sums_of_outer_products(load) -> None:
    products = load("naive").products
    left, right = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    each = [sum(torch.outer(*rows) for rows in zip(a, b, strict=True)) for a, b in zip(left, right, strict=True)]
    assert torch.allclose(products(left[0], right[0]), each[0])
    assert torch.allclose(products(left, right), each[0] + each[1] + each[2])
    assert not torch.allclose(products(left, right), each[0] + each[1])


def test_states_have_clips_norm_a_common_mean_and_a_decaying_spectrum(load) -> None:
    rows = load("naive").states(400, 32, 5)
    assert torch.allclose(rows.norm(dim=1), torch.full((400,), 28.0))
    assert rows.mean(0).norm() > 0.5 * 28
    values = torch.linalg.svdvals(rows - rows.mean(0))
    assert values[0] > 3 * values[-1]
    assert not torch.equal(rows, load("naive").states(400, 32, 6))
    assert torch.equal(rows, load("naive").states(400, 32, 5))


def test_the_matrices_are_those_of_stable_diffusion_1(scale: ModuleType) -> None:
    shapes = [site.shape for site in scale.matrices("full")]
    assert {shape: shapes.count(shape) for shape in shapes} == {(320, 768): 10, (640, 768): 10, (1280, 768): 12}
    assert sum(rows * width for rows, width in shapes) == 19_169_280


def test_error_is_a_part_of_the_edit_and_names_the_worst_site(scale: ModuleType) -> None:
    one, other = list(scale.matrices("tiny"))[:2]
    old = {one: torch.zeros(2, 2), other: torch.zeros(2, 2)}
    true = {site: torch.ones(2, 2, dtype=torch.float64) for site in old}
    told = scale.error({one: torch.ones(2, 2), other: torch.full((2, 2), 1.1)}, true, old)
    assert told["worst_site"] == other.label
    assert told["worst_error"] == pytest.approx(0.1, rel=1e-5)
    assert told["error"] == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    assert scale.error(true, true, old)["error"] == 0.0


@pytest.mark.usefixtures("few")
def test_closed_form_scale_writes_a_row_for_each_pass(
    scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "uce:2,rece:1,mace:1,trce.remap:3"
    monkeypatch.setitem(scale.GOALS, "uce:2", 1e9)
    monkeypatch.setattr(scale, "LONG", ("mace:1",))
    threads = str(torch.get_num_threads())
    scale.main(["--size", "tiny", "--rows", names, "--threads", threads, "--out", str(tmp_path / "out.json")])
    told = json.loads((tmp_path / "out.json").read_text())
    assert list(told["rows"]) == names.split(",")
    for row in told["rows"].values():
        assert all(row[part].keys() >= PARTS for part in ("ours", "whole", "naive32"))
        assert row["naive64"].keys() >= {"seconds", "cpu", "peak_mb", "sites", "extrapolated"}
        assert set(row["ours"]["parts"]) == {"sums", "solve", "merge", "reduced", "stats"}
        assert row["whole"]["error"] < 1e-6 and row["ours"]["error"] < 1e-6 < row["naive32"]["error"]
        assert row["ours"]["ratio32"] == pytest.approx(row["naive32"]["seconds"] / row["ours"]["seconds"])
    assert told["rows"]["mace:1"]["naive32"]["extrapolated"] and told["rows"]["mace:1"]["naive32"]["sites"] == 2
    assert not told["rows"]["uce:2"]["naive32"]["extrapolated"] and told["rows"]["uce:2"]["naive32"]["sites"] == 32
    assert told["rows"]["uce:2"]["over"] == ["ratio"] and told["rows"]["trce.remap:3"]["over"] == []
    assert told["threads"] == int(threads) and told["machine"]["versions"]["torch"]
    printed = capsys.readouterr().out.splitlines()
    assert ["OVER" in line for line in printed[2:]] == [True, False, False, False]


def test_plan_scale_runs_every_plan_and_writes_its_figures(load, tmp_path: Path) -> None:
    plans = load("plan_scale")
    plans.main(["--size", "tiny", "--rounds", "1", "--keep", str(tmp_path), "--out", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows.keys() == plans.PLANS.keys()
    assert all(row["runs"] == [row["cpu"]] and row["cpu"] > 0 for row in rows.values())
    with pytest.raises(SystemExit, match="ended with"):
        plans.plan(tmp_path / "nothing", ("--erase", "church"))


def test_files_scale_applies_in_every_way_and_writes_its_figures(load, tmp_path: Path) -> None:
    files = load("files_scale")

    def here(name: str, written: str, *arguments: str) -> dict[str, float]:
        return files.step(name, written, *arguments) | {"process": 0.0}

    arguments = [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--keep",
        str(tmp_path / "keep"),
        "--out",
        str(tmp_path / "out.json"),
    ]
    files.main(arguments, here)
    told = json.loads((tmp_path / "out.json").read_text())
    assert set(told["rows"]) == STEPS and set(told["made"]) == {"make", "solve", "single"}
    for row in told["rows"].values():
        assert row.keys() == {"seconds", "durable", "process", "peak_mb", "runs"}
        assert 0 < row["seconds"] <= row["durable"] and row["peak_mb"] > 0
    assert told["same_bytes"] is True
    assert told["bytes"]["model"] > told["bytes"]["unet"] > told["bytes"]["edit"] > 0
    assert set(told["ratios"]) == {
        f"{name} / {other}, {key}"
        for name, other in (("apply", "copy_digest"), ("apply_single", "copy_digest_single"))
        for key in ("seconds", "durable")
    }
    left = {path.name for path in (tmp_path / "keep").iterdir()}
    assert left == {"model", "single", "synthetic.edit.safetensors"}


def test_a_step_runs_in_a_process_of_its_own(load, tmp_path: Path) -> None:
    files = load("files_scale")
    (tmp_path / "a").write_bytes(b"weights")
    told = files.fresh("copy", str(tmp_path / "b"), str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert told["process"] > told["durable"] >= told["seconds"] and 0 < told["peak_mb"] < 100
    with pytest.raises(SystemExit, match=r"step copy .* failed with exit code 1"):
        files.fresh("copy", "", str(tmp_path / "missing"), str(tmp_path / "c"))


def test_files_that_differ_or_are_still_the_base_are_not_the_same_bytes(load) -> None:
    agree = load("files_scale").agree
    good = dict.fromkeys(("in_place", "apply", "link"), "new") | dict.fromkeys(
        ("in_place_single", "apply_single"), "one"
    )
    good |= {"base": "old", "base_single": "two"}
    assert agree(good)
    assert not agree(good | {"link": "other"})
    assert not agree(good | {"base": "new"})
    assert not agree(good | {"apply_single": "two", "in_place_single": "two"})


def test_goals_that_are_missed_are_named(load) -> None:
    files = load("files_scale")
    rows = {name: {"seconds": 1.0, "durable": 1.0, "peak_mb": 10.0} for name in STEPS}
    assert files.verdict(rows)["over"] == []
    rows["apply"] = {"seconds": 1.2, "durable": 1.4, "peak_mb": 700.0}
    rows["in_place"] = {"seconds": 1.1, "durable": 1.1, "peak_mb": 10.0}
    assert files.verdict(rows)["over"] == ["apply / copy_digest, durable", "in_place", "apply peak"]


def test_figures_are_medians_and_the_highest_peak(load) -> None:
    runs = [{"copy": {"seconds": float(s), "peak_mb": float(m)}} for s, m in ((3, 5), (1, 9), (2, 4))]
    assert load("files_scale").summary(runs)["copy"] == {"seconds": 2.0, "peak_mb": 9.0, "runs": [3.0, 1.0, 2.0]}


def test_linking_is_held_to_its_goals_and_beside_the_exporters(load) -> None:
    scale = load("link_scale")
    rows = {
        name: {"seconds": 10.0, "durable": 12.0, "process": 20.0, "peak_mb": 100.0} for name in ("copy", "cold", "warm")
    }
    rows |= {"relink": {"seconds": 0.5, "process": 0.8, "peak_mb": 60.0}, "torch": {"seconds": 40.0, "process": 44.0}}
    rows["check outputs"] = {"seconds": 50.0, "loading": 20.0}
    told = scale.verdict(rows)
    assert told["missed"] == []
    assert list(told["ratios"].values()) == [4.0, 44 / 0.8, 1.0]
    rows["relink"] = {"seconds": 0.9, "process": 1.1, "peak_mb": 400.0}
    rows["cold"]["seconds"] = 151.0
    assert scale.verdict(rows)["missed"] == ["cold", "relink", "relink_peak_mb"]
    told = scale.verdict(rows | {"optimum": {"process": 200.0}})
    assert told["ratios"]["optimum / cold, whole processes"] == 10.0


@pytest.mark.slow
def test_link_scale_links_relinks_and_exports(load, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    scale, out = load("link_scale"), tmp_path / "out.json"
    scale.main(["--size", "tiny", "--keep", str(tmp_path / "keep"), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert rows["relink"]["same as linked"] is True
    assert rows["fp16"]["mb"] < 0.7 * rows["warm"]["mb"]
    assert {"cold", "shared", "relink back", "check tensors", "check outputs", "torch"} <= rows.keys()


@pytest.mark.slow
def test_latency_tells_how_far_each_backend_is_off(load, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    latency, out = load("latency"), tmp_path / "out.json"
    arguments = ["--size", "tiny", "--keep", str(tmp_path / "keep"), "--out", str(out)]
    latency.main([*arguments, "--only", "torch fp32", "ort fp32", "openvino int8"])
    latency.main([*arguments, "--only", "ort fp16"])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["torch fp32", "ort fp32", "openvino int8", "ort fp16"]
    assert rows["torch fp32"]["off"] == 0 < rows["ort fp32"]["off"] < 1e-4 < rows["openvino int8"]["off"] < 1e-1
    assert all(row["median"] > 0 and len(row["runs"]) == latency.ROUNDS for row in rows.values())


@pytest.mark.slow
def test_int8_glyphs_judges_every_row(load, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnx_ir")  # onnxruntime quantizes to int4 with it
    int8, out = load("int8_glyphs"), tmp_path / "out.json"
    int8.main(["--images", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {f"{name}, {row}" for name in ("base", "erased") for row in int8.ROWS}
    for name in ("base", "erased"):
        exact, small = rows[f"{name}, onnx fp32"], rows[f"{name}, onnx int8"]
        assert (exact["psnr"], exact["agreement"]) == (99.0, 1.0)
        assert small["psnr"] < 99 and small["bytes"]["unet"] < exact["bytes"]["unet"]
        assert exact["parity"]["unet"] < 1e-4 < small["parity"]["unet"]


def test_of_two_equal_samples_every_gap_is_likely_and_of_two_unequal_ones_it_is_not(load) -> None:
    fisher = load("audit_worlds").fisher
    assert fisher(3, 10, 3, 10) == pytest.approx(0.6858, abs=1e-4)  # scipy.stats.fisher_exact, "greater"
    assert fisher(18, 20, 1, 20) == pytest.approx(3.0e-8, rel=0.1)
    assert fisher(0, 10, 10, 10) == 1.0


def test_an_attack_is_accepted_where_it_tells_the_shallow_edit_from_the_twin(load) -> None:
    def rows(uce: int, twin: int, base: int) -> dict[str, dict[str, dict[str, list[int]]]]:
        named = {"prompts: name": {"attack": [20, 20]}}
        return {
            name: {**named, "a": {"attack": [hits, 20]}}
            for name, hits in (("uce", uce), ("twin", twin), ("base", base))
        }

    accept = load("audit_worlds").accept
    assert accept(rows(18, 1, 19))["a"].accepted
    assert not accept(rows(18, 17, 19))["a"].accepted  # the twin shows it too
    assert not accept(rows(5, 0, 19))["a"].accepted  # the gap is too small
    assert not accept(rows(18, 1, 10))["a"].accepted  # it does not work on the base
    stronger = {**rows(8, 0, 20), "project": {"a": {"attack": [20, 20]}}}
    assert not accept(stronger)["a"].ranked
    assert accept(rows(8, 0, 20))["a"].ranked
