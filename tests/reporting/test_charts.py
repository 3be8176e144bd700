"""Charts and the map of moves: what is drawn lies where the numbers say, and every tensor is counted once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest

from erasec.model import loading
from erasec.reporting import charts
from erasec.reporting.charts import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, ROWS, TOP, WIDTH, Chart
from erasec.reporting.report import SiteMove


def points(drawn: Chart, line: int = 0) -> list[tuple[float, float]]:
    found = re.findall(r"[ML](\S+?) (-?[\d.]+)", drawn.lines[line].path)
    return [(float(x), float(y)) for x, y in found]


def move(key: str, block: str, attn: str = "cross", proj: str = "k", size: float = 1.0, moved: float = 0.5) -> SiteMove:
    return SiteMove(key, block, attn, proj, (4, 4), size, moved, 1)


def test_losses_share_a_chart_drift_has_its_own_and_others_each_one() -> None:
    curves = {"loss hide": [1.0], "hits": [3.0], "drift": [0.0, 0.1], "loss keep": [2.0], "size": [1.0], "none": []}
    drawn = charts.charts(curves)
    assert [chart.title for chart in drawn] == ["loss", "hits", "drift", "size"]
    assert [line.name for line in drawn[0].lines] == ["loss hide", "loss keep"]


def test_points_lie_where_the_numbers_say() -> None:
    (drawn,) = charts.charts({"hits": [0.0, 1.0, 2.0, 4.0]})
    height = HEIGHT - TOP - BOTTOM
    assert [y for _, y in points(drawn)] == pytest.approx(
        [TOP + height * (1 - part / 4) for part in (0, 1, 2, 4)], abs=0.1
    )
    assert [x for x, _ in points(drawn)] == pytest.approx(
        [LEFT + (WIDTH - LEFT - RIGHT) * step / 4 for step in (1, 2, 3, 4)], abs=0.1
    )
    assert drawn.rows[0] == (HEIGHT - BOTTOM, "0") and drawn.rows[-1] == (TOP, "4")
    assert [label for _, label in drawn.columns] == ["0", "1", "2", "3", "4"]


def test_a_curve_that_was_measured_now_and_then_reaches_the_last_step() -> None:
    (drawn,) = charts.charts({"drift": [0.0, 1.0]}, steps=400)
    per_step = (WIDTH - LEFT - RIGHT) / 400
    assert [x for x, _ in points(drawn)] == pytest.approx([LEFT + per_step, WIDTH - RIGHT], abs=0.1)
    assert drawn.columns[-1] == (WIDTH - RIGHT, "400")


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([1.0, 0.03], True), ([1.0, 0.04], False), ([1.0, 0.0], False), ([1.0, -50.0], False), ([1e-9, 2e-9], False)],
)
def test_wide_positive_values_are_drawn_by_their_logarithm(values: list[float], logarithmic: bool) -> None:
    (drawn,) = charts.charts({"loss": values})
    assert ("logarithmic" in drawn.about) is logarithmic
    assert len(drawn.rows) >= 2 and all(TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for y, _ in drawn.rows)


def test_decades_are_labelled() -> None:
    (drawn,) = charts.charts({"loss": [1e-6, 1e-4, 10.0]})
    labels = [label for _, label in drawn.rows]
    assert labels == ["10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1", "10"]
    places = [y for y, _ in drawn.rows]
    assert places == sorted(places, reverse=True)


def test_many_points_become_means_of_neighbours() -> None:
    values = [float(at % 2) for at in range(10 * POINTS)]
    (drawn,) = charts.charts({"hits": values})
    assert len(points(drawn)) == POINTS
    (constant,) = {y for _, y in points(drawn)}
    (few,) = charts.charts({"hits": values[:POINTS]})
    assert len(points(few)) == POINTS and len({y for _, y in points(few)}) == 2
    assert TOP < constant < HEIGHT - BOTTOM
    (uneven,) = charts.charts({"hits": [0.0] * (POINTS + 7)})
    assert len(points(uneven)) == POINTS


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    (drawn,) = charts.charts({"loss": [1.0, 2.0, math.nan, 3.0, math.inf]})
    assert drawn.lines[0].path.count("M") == 2 and len(points(drawn)) == 3
    assert "nan" not in drawn.lines[0].path and "inf" not in drawn.lines[0].path
    (empty,) = charts.charts({"loss": [math.nan]})
    assert empty.lines[0].path == "" and "goes from nan to nan" in empty.about


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-2.0, -2.0], [1e-30, 1e-30], [1e300, 1e300]])
def test_a_flat_curve_is_drawn_inside(values: list[float]) -> None:
    (drawn,) = charts.charts({"hits": values})
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in points(drawn)) and len(points(drawn)) == len(values)
    assert drawn.rows


def names(tables: Sequence[charts.HeatMap]) -> list[str]:
    return [name for table in tables for name, _ in table.rows]


def test_rows_are_in_network_order_and_text_goes_first() -> None:
    blocks = (
        "up.0.attentions.0.0",
        "conv_out",
        "down.1.resnets.0",
        "down.0.downsamplers.0",
        "conv_norm_out",
        "mid_block.attentions.0.0",
        "down.0.attentions.0.transformer.0.ff",
        "down.0.resnets.1",
        "down.0.resnets.0",
        "mid_block.resnets.1",
        "mid_block.resnets.0",
        "time_embedding",
        "conv_in",
        "down.10.resnets.0",
    )
    texts = (
        "text_encoder final_layer_norm",
        "text_encoder_2 embeddings",
        "text_encoder encoder.layers.10.mlp",
        "text_encoder encoder.layers.2.self_attn",
        "text_encoder embeddings",
    )
    moves = [move("key", block) for block in blocks] + [move("key", block, "text", "") for block in texts]
    assert names(charts.heat_map(moves)) == [
        "text_encoder embeddings",
        "text_encoder encoder.layers.2",
        "text_encoder encoder.layers.10",
        "text_encoder final_layer_norm",
        "text_encoder_2 embeddings",
        "conv_in",
        "time_embedding",
        "down.0.resnets.0",
        "down.0.attentions.0",
        "down.0.resnets.1",
        "down.0.downsamplers.0",
        "down.1.resnets.0",
        "down.10.resnets.0",
        "mid.resnets.0",
        "mid.attentions.0",
        "mid.resnets.1",
        "up.0.attentions.0",
        "conv_norm_out",
        "conv_out",
    ]


def test_a_cell_holds_its_tensors_as_one_vector() -> None:
    moves = [
        move("a", "down.0.attentions.0.0", size=3.0, moved=0.3),
        move("b", "down.0.attentions.0.0", size=4.0, moved=2.0),
    ]
    ((_, (cell,)),) = charts.heat_map(moves)[0].rows
    assert cell is not None and cell.change == pytest.approx(math.hypot(0.3, 2.0) / 5)
    assert cell.about == "2 tensors; most moved: b 4 × 4, rank 1"
    ((_, (alone,)),) = charts.heat_map(moves[:1])[0].rows
    assert alone is not None and (alone.change, alone.about) == (0.3 / 3.0, "a 4 × 4, rank 1")


def test_a_weight_of_zeros_is_no_division_by_zero() -> None:
    assert charts.relative(1.0, 0.0) == math.inf and charts.relative(0.0, 0.0) == 0.0
    (table,) = charts.heat_map([move("a", "conv_in", size=0.0), move("b", "conv_out", size=2.0)])
    assert table.most == 0.25


def test_every_tensor_of_a_model_has_its_place() -> None:
    sites = loading.load("glyphs").parameters
    moves = [SiteMove(site.key, site.block, site.attn, site.proj, site.shape, 1.0, 1.0, 1) for site in sites]
    text, denoiser = charts.heat_map(moves)
    assert text.columns == ("k", "v", "q", "out", "mlp", "other")
    assert denoiser.columns == (
        *(f"{attn} {proj}" for attn in ("cross", "self") for proj in ("k", "v", "q", "out")),
        "other",
    )
    counts = [
        re.match(r"(\d+) tensors", cell.about)
        for table in (text, denoiser)
        for _, row in table.rows
        for cell in row
        if cell
    ]
    assert sum(int(count[1]) if count else 1 for count in counts) == len(sites)
    assert len(names((text, denoiser))) <= ROWS


def test_too_many_rows_become_stages() -> None:
    few = [move("key", f"down.{at % 4}.resnets.{at}") for at in range(ROWS)]
    assert len(names(charts.heat_map(few))) == ROWS
    many = [*few, move("key", "down.0.resnets.1000"), move("key", "text_encoder encoder.layers.3.mlp", "text", "mlp")]
    assert names(charts.heat_map(many)) == ["text_encoder encoder", "down.0", "down.1", "down.2", "down.3"]


def test_a_reach_is_drawn_from_its_radii() -> None:
    rows = [
        {"concept": "star", "radii": (0.0, 0.5, 2.0), "residual": (1.0, 0.5, 0.25)},
        {"concept": "heart", "radii": (0.0, 0.5, 2.0), "residual": (0.9, 0.9, 0.9)},
    ]
    drawn = charts.reach_chart(rows)
    assert [(line.name, line.first, line.last) for line in drawn.lines] == [("star", 1.0, 0.25), ("heart", 0.9, 0.9)]
    assert (drawn.up, drawn.columns[0], drawn.columns[-1]) == ("R", (LEFT, "0"), (WIDTH - RIGHT, "2"))
    middle = round(LEFT + (WIDTH - LEFT - RIGHT) / 4, 1)
    assert f"L{middle} " in drawn.lines[0].path
