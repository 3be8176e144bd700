"""Charts of a report: training curves as SVG paths, and a heat map of the change of each part of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erasec.reporting.report import SiteMove

WIDTH, HEIGHT = 560, 230  # units of the SVG, with the labels' margins
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 42
POINTS = 300
LOG_FROM = 30  # positive values that span more than this factor are drawn on a logarithmic scale
ROWS = 64

# The order of the parts of a model. Parts that are not listed come last.
ORDER = (
    "embeddings",
    "shared",
    "encoder",
    "conv_in",
    "pos_embed",
    "x_embedder",
    "time",
    "add_embedding",
    "context_embedder",
    "down",
    "mid",
    "up",
    "transformer",
    "single_transformer",
)
ATTENTIONS = ("cross", "self", "joint", "context", "single", "pooled", "text", "other")
PROJECTIONS = ("k", "v", "q", "out", "embed", "mlp", "")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """One curve: its SVG path, and its first and last value."""

    name: str
    path: str
    first: float
    last: float


@dataclass(frozen=True)
class Chart:
    """Curves in one pair of axes. ``columns`` and ``rows`` are the ticks of x and y: (position, label). ``across`` and
    ``up`` are what the axes show."""

    title: str
    about: str
    lines: tuple[Line, ...]
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    across: str = "step"
    up: str = "value"


@dataclass(frozen=True)
class Cell:
    """The tensors of one kind in one part: norm of the change over norm of the weights, and a text about them."""

    change: float
    about: str


@dataclass(frozen=True)
class HeatMap:
    """A heat map. Rows are parts of the model: (name, a cell or None for each column). Columns are kinds of tensors."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]

    @property
    def cells(self) -> int:
        return sum(cell is not None for _, row in self.rows for cell in row)

    @property
    def most(self) -> float:
        """The largest finite change."""
        changes = (cell.change for _, row in self.rows for cell in row if cell is not None)
        return max((change for change in changes if math.isfinite(change)), default=0.0)


# --- curves --------------------------------------------------------------------------------------------------------


def charts(curves: Mapping[str, Sequence[float]], steps: float = 0) -> tuple[Chart, ...]:
    """Charts of training curves: all losses in one chart, all drifts in another, each other curve in its own.

    The values of a curve are spaced evenly from the first step to the last step, ``steps``. By default a curve has one
    value per step.
    """
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for name, values in curves.items():
        title = next((kind for kind in ("loss", "drift") if name.startswith(kind)), name)
        if values:
            groups.setdefault(title, {})[name] = values
    return tuple(_chart(title, group, steps) for title, group in groups.items())


def reach_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """The residual R(r) of each concept, from the facts of ``closed_form.reach.Reach``."""
    points = {row["concept"]: list(zip(row["radii"], row["residual"], strict=True)) for row in rows}
    return _draw(
        "How near a text state comes to the outputs of the concept",
        _trends({row["concept"]: row["residual"] for row in rows}),
        points,
        max(row["radii"][-1] for row in rows),
        "distance from the concept's own text state, in lengths of it",
        "R",
        from_zero=True,
    )


def _chart(title: str, group: Mapping[str, Sequence[float]], steps: float) -> Chart:
    end = steps or max(len(values) for values in group.values())
    points = {name: _downsample(values, end) for name, values in group.items()}
    drawn = _draw(title, f"{_trends(group)}; {end:g} steps", points, end)
    ends = {name: (values[0], values[-1]) for name, values in group.items()}
    lines = tuple(Line(line.name, line.path, *ends[line.name]) for line in drawn.lines)
    whole = tuple(tick for tick in drawn.columns if float(tick[1]).is_integer())
    return replace(drawn, lines=lines, columns=whole)


def _trends(group: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{name} goes from {_label(values[0])} to {_label(values[-1])}" for name, values in group.items())


def _draw(
    title: str,
    about: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    end: float,
    across: str = "step",
    up: str = "value",
    from_zero: bool = False,
) -> Chart:
    """The lines through ``points`` (x, y) by name, from x = 0 to ``end``. ``from_zero`` begins the axis of y at 0."""
    finite = [y for line in points.values() for _, y in line if math.isfinite(y)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if from_zero else low
    logarithmic = low > 0 and high > LOG_FROM * low
    if logarithmic:
        ticks = _decades(low, high)
        low, high = math.log10(low), math.log10(high)
    else:
        if low == high:
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        low = 0.0 if 0 <= low < high / 2 else low
        ticks = _round_numbers(low, high, 4)

    def right(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / end, 1)

    def down(y: float) -> float:
        y = math.log10(y) if logarithmic else y
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low), 1)

    def path(line: Iterable[tuple[float, float]]) -> str:
        # A value that is not finite interrupts the line. "h0" draws a single point as a dot, with round line ends.
        commands, pen_down = [], False
        for x, y in line:
            if math.isfinite(y):
                commands.append(f"L{right(x)} {down(y)}" if pen_down else f"M{right(x)} {down(y)}h0")
            pen_down = math.isfinite(y)
        return "".join(commands)

    scale = "a logarithmic" if logarithmic else "a linear"
    return Chart(
        title,
        f"{about}, {scale} scale.",
        tuple(Line(name, path(line), line[0][1], line[-1][1]) for name, line in points.items()),
        tuple((right(x), _label(x)) for x in _round_numbers(0, end, 6)),
        tuple((down(y), _label(y)) for y in ticks),
        across,
        up,
    )


def _downsample(values: Sequence[float], end: float) -> list[tuple[float, float]]:
    """Points (step, value), at most ``POINTS``: of longer curves, the means of neighbouring finite values."""
    count = min(len(values), POINTS)
    stride = (end - 1) / max(1, len(values) - 1)
    points = []
    for at in range(count):
        first, last = at * len(values) // count, (at + 1) * len(values) // count
        finite = [value for value in values[first:last] if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if finite else math.nan
        points.append((1 + stride * (first + last - 1) / 2, mean))
    return points


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    """About ``most`` multiples of 1, 2 or 5 times a power of ten between two numbers."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{at * step:.9g}") for at in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, at most eight; if there are fewer than 3, also 2 and 5 times powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = -(-(last - first) // 7)
    powers = [10.0**power for power in range(first, last + 1, stride)]
    inside = [power for power in powers if low <= power <= high]
    if len(inside) < 3:
        inside = [times * power for power in powers for times in (1, 2, 5) if low <= times * power <= high]
    return inside


def _label(value: float) -> str:
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}".replace("-", "−")
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{float(digits):g}×10{str(int(power)).translate(SUPERSCRIPTS)}".replace("-", "−").removeprefix("1×")


# --- the heat map -----------------------------------------------------------------------------------------------------


def heat_map(moves: Sequence[SiteMove]) -> tuple[HeatMap, ...]:
    """One heat map for the text encoders and one for the denoiser, with a row for each layer, resnet or attention.

    If these are more than ``ROWS`` rows, there is a row for each stage instead. Several tensors in a cell count as one
    vector.
    """
    level = 0 if len({_part(move.block, 0) for move in moves}) <= ROWS else 1
    sides = [[move for move in moves if (move.attn == "text") == text] for text in (True, False)]
    return tuple(_table(side, level) for side in sides if side)


def _table(moves: Sequence[SiteMove], level: int) -> HeatMap:
    groups: dict[str, dict[tuple[str, str], list[SiteMove]]] = {}
    for move in moves:
        groups.setdefault(_part(move.block, level), {}).setdefault((move.attn, move.proj), []).append(move)
    kinds = sorted({(move.attn, move.proj) for move in moves}, key=_column_order)
    rows = [
        (part, tuple(_cell(cells[kind]) if kind in cells else None for kind in kinds))
        for part, cells in sorted(groups.items(), key=lambda item: _network_order(item[0]))
    ]
    titles = (f"{attn} {proj}".strip() if attn != "text" else proj or "other" for attn, proj in kinds)
    return HeatMap(tuple(titles), tuple(rows))


def _cell(moves: Sequence[SiteMove]) -> Cell:
    # math.hypot of one number returns exactly that number
    moved, weight = math.hypot(*(move.moved for move in moves)), math.hypot(*(move.size for move in moves))
    first = max(moves, key=lambda move: move.change)
    about = f"{first.key} {' × '.join(map(str, first.shape))}, rank {first.rank}"
    return Cell(relative(moved, weight), about if len(moves) == 1 else f"{len(moves)} tensors; most moved: {about}")


def relative(moved: float, size: float) -> float:
    """Norm of a change over norm of the weight; infinite if a weight of zeros changed."""
    return moved / size if size else math.inf if moved else 0.0


def _part(block: str, level: int) -> str:
    """The row of a block: its name up to the second number in the stages of a UNet, up to the first elsewhere; with one
    number fewer at ``level`` 1. "down.0.attentions.1.transformer.0.ff" has the row "down.0.attentions.1" at level 0,
    "down.0" at level 1."""
    component, _, path = block.rpartition(" ")
    parts = path.replace("mid_block", "mid").split(".")
    depth = (2 if parts[0] in ("down", "up") else 1) - level
    numbers = [at for at, part in enumerate(parts) if part.isdigit()][:depth]
    return f"{component} {'.'.join(parts[: numbers[-1] + 1 if numbers else 1])}".strip()


def _network_order(part: str) -> tuple[str, int, list[int], bool, list[int], bool, str]:
    component, _, path = part.rpartition(" ")
    stage = next((at for at, name in enumerate(ORDER) if path.startswith(name)), len(ORDER))
    numbers = [int(word) for word in path.split(".") if word.isdigit()]
    # In a stage, a resnet precedes the attention of the same number, and samplers come last.
    return component, stage, numbers[:1], "samplers" in path, numbers[1:], "attentions" in path, path


def _column_order(kind: tuple[str, str]) -> tuple[int, int, tuple[str, str]]:
    attn, proj = kind
    return (
        ATTENTIONS.index(attn) if attn in ATTENTIONS else len(ATTENTIONS),
        PROJECTIONS.index(proj) if proj in PROJECTIONS else len(PROJECTIONS),
        kind,
    )
