"""The tables of the README and of docs/ are the committed results, and the results meet their goals.

A pass without results is allowed: adding a pass does not ask for a benchmark. A row without a result is not, nor is a
result without its row, or a row with another figure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from erasec import registry
from erasec.cli.app import app
from erasec.closed_form.base import ClosedForm
from erasec.glyphs import world

LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]*))?\)")
GROUPS = ("name", "synonym", "implicit")
ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
BASE, NEVER = "base", "never-star model"

# The headers of the tables, by which they are found.
CLOSED_FORM = "| pass | by name | by synonym | implicit | most lost by others |"
LEARNED = "| pass | by name | by synonym | implicit | others | colours |"
ALL_PASSES = "| pass | by name | by synonym | implicit | others | colours | drift | seconds | memory |"
WATERMARK = "| watermark | pictures with the mark | shapes |"
SPEED = (
    "| row | erasec | naive float32 | naive float64 | ratio to 32 | to 64 | peak memory, erasec and naive 32 "
    "| error, erasec | error, naive 32 |"
)
FILES = "| step | after imports | on disk (fsync) | whole process | peak memory |"
LINKING = "| | seconds | on disk | process | peak memory |"
LATENCY = "| | median | load | peak memory | off from torch float32 |"


def results(root: Path, name: str) -> dict[str, Any]:
    """One file of results."""
    content: dict[str, Any] = json.loads((root / "tests/benchmarks/results" / f"{name}.json").read_text())
    return content


def page(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def table_rows(text: str, header: str) -> list[str]:
    """The rows of the one table of a page that has this header."""
    lines = text.splitlines()
    assert lines.count(header) == 1, header
    rows = []
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line)
    return rows


def differences(text: str, header: str, expected: Iterable[str], complete: bool = True) -> list[str]:
    """Rows of a page's table that no result gives and, where the table is to be ``complete``, results without a row."""
    rows, wanted = table_rows(text, header), list(expected)
    missing = [row for row in wanted if row not in rows] if complete else []
    return [row for row in rows if row not in wanted] + missing + sorted({row for row in rows if rows.count(row) > 1})


def unregistered(setups: Iterable[str]) -> list[str]:
    """Setups such as "uce:rows=last, one word" or "esd+safegen" whose passes are not registered."""
    names = {setup: re.sub(r"[:, ].*", "", setup).split("+") for setup in setups if setup not in (BASE, NEVER)}
    return [setup for setup, parts in names.items() if not set(parts) <= registry.passes().keys()]


@pytest.fixture(scope="module")
def closed_form(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of the closed-form passes, by shape and then by setup."""
    rows: dict[str, dict[str, dict[str, Any]]] = results(root, "closed_form_glyphs")["rows"]
    return rows


@pytest.fixture(scope="module")
def measured(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of all passes, by concept and then by pass or chain of passes."""
    rows: dict[str, dict[str, dict[str, Any]]] = results(root, "passes_glyphs")["rows"]
    return rows


def percent(before: float, after: float) -> str:
    return f"{before:.0%} → {after:.0%}".replace("%", " %")


def closed_form_row(rows: dict[str, dict[str, dict[str, Any]]], setup: str) -> str:
    """One row of the table: means over the shapes, and the largest loss that the other shapes suffered."""
    cells = []
    for group in GROUPS:
        pairs = [row[setup][group][:2] for row in rows.values() if group in row[setup]]
        cells.append(percent(*(sum(pair[index] for pair in pairs) / len(pairs) for index in (0, 1))))
    loss = max(row[setup]["keep"][0] - row[setup]["keep"][1] for row in rows.values())
    return f"| {setup} | {' | '.join(cells)} | {max(0.0, loss) * 100:.0f} points |"


def at_defaults(setups: Iterable[str]) -> list[str]:
    """The setups that are one pass with its defaults on a shape's whole file."""
    return [setup for setup in setups if not re.search("[,:+]", setup)]


def test_the_closed_form_tables_are_the_results(root: Path, closed_form: dict[str, dict[str, dict[str, Any]]]) -> None:
    assert set(closed_form) == set(world.SHAPES)
    setups = list(next(iter(closed_form.values())))
    assert all(list(row) == setups for row in closed_form.values())
    assert unregistered(setups) == []
    expected = {setup: closed_form_row(closed_form, setup) for setup in setups}
    assert differences(page(root, "docs/closed_form.md"), CLOSED_FORM, expected.values()) == []
    defaults = at_defaults(setups)
    assert all(issubclass(registry.load_pass(name), ClosedForm) for name in defaults)
    assert differences(page(root, "README.md"), CLOSED_FORM, [expected[name] for name in defaults]) == []


def test_every_pass_erases_every_shape_and_keeps_the_rest(closed_form: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Names at most 15 % of before, other shapes at most 8 points less, at every pass's defaults."""
    for shape, row in closed_form.items():
        for name in at_defaults(row):
            before, after, _ = row[name]["name"]
            assert after <= 0.15 * before, (shape, name)
            assert row[name]["keep"][0] - row[name]["keep"][1] <= 0.08, (shape, name)


def test_the_end_token_reaches_what_the_words_own_token_does_not(
    closed_form: dict[str, dict[str, dict[str, Any]]],
) -> None:
    """One word erased, as in the docs: TRCE's remap against UCE's present rule, on implicit prompts and synonyms."""
    for group in ("synonym", "implicit"):
        trce, uce = (
            sum(row[setup][group][1] for row in closed_form.values() if group in row[setup])
            for setup in ("trce.remap, one word", "uce:rows=last, one word")
        )
        assert trce < uce


@pytest.mark.parametrize("name", ["closed_form_scale", "closed_form_scale_sdxl", "files_scale"])
def test_figures_at_full_size_say_how_they_were_made(root: Path, name: str) -> None:
    content = results(root, name)
    assert content["size"] == "full"
    assert {"cores", "ram_gb", "versions"} <= set(content["machine"])
    assert f"results/{name}.json" in page(root, "docs/closed_form.md")


def speed_row(name: str, row: dict[str, Any]) -> str:
    """One row of the table: seconds, ratios and errors of erasec and of the naive codes; ~ marks extrapolated times."""
    ours, naive = row["ours"], (row["naive32"], row["naive64"])
    mark = "~" if naive[0]["extrapolated"] else ""
    seconds = [f"{mark}{part['seconds']:.3g} s" for part in naive]
    ratios = [f"{mark}{ours[f'ratio{bits}']:.0f}×" for bits in (32, 64)]
    # An extrapolated row was measured on a part of the matrices, whose peak memory says nothing.
    memory = f"{ours['peak_mb']:.0f} MB, " + ("–" if mark else f"{naive[0]['peak_mb']:.0f} MB")
    errors = [f"{part['error']:.0e}" for part in (ours, naive[0])]
    cells = (name, f"{ours['seconds']:.3f} s", *seconds, *ratios, memory, *errors)
    return f"| {' | '.join(cells)} |"


def test_the_speed_tables_are_the_result(root: Path) -> None:
    """Ratios to the naive float64 and float32, and errors, of every row that was measured."""
    rows = results(root, "closed_form_scale")["rows"]
    expected = [speed_row(name, row) for name, row in rows.items()]
    assert differences(page(root, "docs/closed_form.md"), SPEED, expected) == []
    assert differences(page(root, "README.md"), SPEED, expected, complete=False) == []
    for name, row in rows.items():
        assert row["ours"]["error"] <= 1e-6 and row["whole"]["error"] <= 1e-6, name


STEPS = {
    "copy": "copy the folder (4.3 GB)",
    "copy_digest": "the same, then the sha256 of each file",
    "apply": "`erasec apply EDIT FOLDER --out OUT`",
    "link": "the same with `--link`",
    "in_place": "`erasec apply EDIT FOLDER --in-place`, with its journal",
    "copy_single": "copy the single file",
    "copy_digest_single": "the same, then its sha256",
    "apply_single": "`erasec apply EDIT FILE --out FILE`",
    "in_place_single": "`erasec apply EDIT FILE --in-place`",
}


def file_row(step: str, row: dict[str, Any]) -> str:
    """One row of the table on files; ``step`` is its key in the results."""
    seconds = " | ".join(f"{row[part]:.1f} s" for part in ("seconds", "durable", "process"))
    return f"| {STEPS[step]} | {seconds} | {row['peak_mb']:.0f} MB |"


def test_the_table_of_files_is_the_result_and_meets_its_goals(root: Path) -> None:
    """Within 1.3 of a copy with digests, 600 MB at most."""
    rows = results(root, "files_scale")["rows"]
    expected = [file_row(step, rows[step]) for step in STEPS]
    assert differences(page(root, "docs/closed_form.md"), FILES, expected) == []
    assert all(rows[step]["peak_mb"] <= 600 for step in STEPS)
    assert rows["apply"]["durable"] <= 1.3 * rows["copy_digest"]["durable"]


@pytest.mark.xfail(strict=True, reason="1.1 s, in part for the tokenizer, which is read with every model")
def test_an_edit_in_place_takes_a_second(root: Path) -> None:
    assert results(root, "files_scale")["rows"]["in_place"]["durable"] <= 1.0


@pytest.mark.xfail(strict=True, reason="2.6: half of it is the sha256 of what was written, for the manifest")
def test_apply_takes_no_longer_than_a_copy(root: Path) -> None:
    rows = results(root, "files_scale")["rows"]
    assert rows["apply"]["durable"] <= 1.3 * rows["copy"]["durable"]


def pass_cells(measured: dict[str, dict[str, dict[str, Any]]], setup: str) -> list[str]:
    """The cells of one row of the table of all passes: means over the concepts that were measured, losses in points,
    the most seconds and memory."""
    rows = [row[setup] for concept, row in measured.items() if setup in row and concept != "watermark"]
    cells = [setup if len(rows) > 1 else f"{setup} (star alone)"]
    for group in GROUPS:
        cells.append(percent(*(sum(row[group][index] for row in rows) / len(rows) for index in (0, 1))))
    lost, colours = (100 * sum(row[key][0] - row[key][1] for row in rows) / len(rows) for key in ("keep", "colours"))
    worst = max((row["worst"][1] - row["worst"][2], row["worst"][0]) for row in rows)
    cells.append(f"{lost:.0f}, {worst[1]} {100 * worst[0]:.0f}".replace("-0,", "0,"))
    cells.append(f"{colours:.0f}".replace("-0", "0"))
    cells.append(f"{sum(row['drift'] for row in rows) / len(rows):.3f}")
    cells.append(f"{max(row['seconds'] for row in rows):.0f} s" if "seconds" in rows[0] else "–")
    cells.append(f"{max(row['peak_gb'] for row in rows):.1f} GB" if "peak_gb" in rows[0] else "–")
    return cells


def watermark_row(setup: str, row: dict[str, Any]) -> str:
    before, after, images = row["implicit"]
    assert images >= 200
    marks = f"{before:.1%} → {after:.1%}".replace("%", " %")
    return f"| {setup} | {marks} | {percent(*row['keep'][:2])} |"


def test_the_tables_of_all_passes_are_the_results(root: Path, measured: dict[str, dict[str, dict[str, Any]]]) -> None:
    setups = list(dict.fromkeys(setup for name, row in measured.items() if name != "watermark" for setup in row))
    assert {BASE, NEVER} < set(setups)
    assert unregistered(setups) == []
    cells = [pass_cells(measured, setup) for setup in setups]
    learned = page(root, "docs/learned.md")
    assert differences(learned, ALL_PASSES, [f"| {' | '.join(row)} |" for row in cells]) == []
    columns = LEARNED.count("|") - 1
    expected = [f"| {' | '.join(row[:columns])} |" for row in cells]
    assert differences(page(root, "README.md"), LEARNED, expected, complete=False) == []
    marks = [watermark_row(setup, row) for setup, row in measured["watermark"].items()]
    assert differences(learned, WATERMARK, marks) == []


def test_the_best_recipe_is_within_noise_of_the_never_model(measured: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Names at most 3 %, synonyms 5 %, implicit 10 % of pictures, others 3 points less; no pass above four minutes."""
    for concept in ("star", "heart", "ring"):
        row = measured[concept]["uce"]
        assert all(row[group][1] <= limit for group, limit in zip(GROUPS, (0.03, 0.05, 0.10), strict=True))
        assert row["keep"][0] - row["keep"][1] <= 0.03
    assert all(row.get("seconds", 0) <= 240 for rows in measured.values() for row in rows.values())
    # The controls: the base shows what prompts ask for, and the never-star model none of it.
    assert all(measured["star"][BASE][group][1] > 0.9 for group in GROUPS)
    assert all(measured["star"][NEVER][group][1] < 0.03 for group in GROUPS)


def link_row(name: str, row: dict[str, Any]) -> str:
    """One row of the table of docs/deploy.md on linking."""
    values = (row.get("seconds"), row.get("durable"), row["process"])
    cells = ("–" if value is None else f"{value:.2g} s" if value < 10 else f"{value:.0f} s" for value in values)
    return f"| {name} | {' | '.join(cells)} | {row['peak_mb'] / 1000:.2g} GB |"


def latency_row(name: str, row: dict[str, Any]) -> str:
    """One row of the table of docs/deploy.md on latency."""
    off = f"{row['off']:.0e}" if row["off"] else "0"
    return f"| {name} | {row['median']:.1f} s | {row['load']:.1f} s | {row['peak_mb'] / 1000:.1f} GB | {off} |"


def test_the_tables_on_deployment_are_the_results(root: Path) -> None:
    text = page(root, "docs/deploy.md")
    link, latency = results(root, "link_scale"), results(root, "latency")
    assert {link["size"], latency["size"]} == {"full"}
    assert differences(text, LINKING, [link_row(*item) for item in link["rows"].items()]) == []
    assert differences(text, LATENCY, [latency_row(*item) for item in latency["rows"].items()]) == []
    assert link["rows"]["relink"]["same as linked"]
    assert not link["missed"] or all(goal in text for goal in link["missed"])


def test_a_pass_without_results_needs_no_row(
    root: Path,
    closed_form: dict[str, dict[str, dict[str, Any]]],
    measured: dict[str, dict[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.PASSES, "new", registry.PASSES["uce"])
    assert "new" in registry.passes()
    test_the_closed_form_tables_are_the_results(root, closed_form)
    test_the_tables_of_all_passes_are_the_results(root, measured)


def test_results_of_a_pass_that_is_not_registered_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    setups = [BASE, NEVER, "uce", "uce:rows=last, one word", "esd+uce"]
    assert unregistered(setups) == []
    monkeypatch.delitem(registry.PASSES, "esd")
    assert unregistered(setups) == ["esd+uce"]


def test_a_page_that_differs_from_the_results_is_noticed() -> None:
    """A changed figure, a row without a result, a result without a row, and a row twice, each in turn."""
    header, rows = "| pass | loss |", ["| uce | 2 |", "| esd | 3 |"]

    def text(*lines: str) -> str:
        return "\n".join(["Some text.", "", header, "|---|---|", *lines, "", "| not | of this table |"])

    assert differences(text(*rows), header, rows) == []
    assert differences(text("| uce | 1 |", rows[1]), header, rows) == ["| uce | 1 |", "| uce | 2 |"]
    assert differences(text(*rows, "| new | 0 |"), header, rows) == ["| new | 0 |"]
    assert differences(text(rows[0]), header, rows) == [rows[1]]
    assert differences(text(*rows, rows[0]), header, rows) == [rows[0]]
    # A page that shows a part of the results may leave rows out, and may change none.
    assert differences(text(rows[0]), header, rows, complete=False) == []
    assert differences(text("| uce | 1 |"), header, rows, complete=False) == ["| uce | 1 |"]
    with pytest.raises(AssertionError):
        differences(text(*rows), "| pass | gain |", rows)


@pytest.mark.parametrize(
    ("name", "header", "complete"),
    [
        ("README.md", CLOSED_FORM, True),
        ("README.md", LEARNED, False),
        ("README.md", SPEED, False),
        ("docs/closed_form.md", CLOSED_FORM, True),
        ("docs/closed_form.md", SPEED, True),
        ("docs/closed_form.md", FILES, True),
        ("docs/learned.md", ALL_PASSES, True),
        ("docs/learned.md", WATERMARK, True),
        ("docs/deploy.md", LINKING, True),
        ("docs/deploy.md", LATENCY, True),
    ],
)
def test_a_changed_figure_in_any_table_is_noticed(root: Path, name: str, header: str, complete: bool) -> None:
    text = page(root, name)
    rows = table_rows(text, header)
    assert len(rows) > 1
    for row in rows:
        digits = [index for index, letter in enumerate(row) if letter.isdigit()]
        for index in digits:
            other = row[:index] + str((int(row[index]) + 1) % 10) + row[index + 1 :]
            assert other in differences(text.replace(row, other, 1), header, rows, complete)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(root: Path, name: str) -> None:
    text = page(root, name)
    links = LINK.findall(text)
    assert links
    for path, anchor in links:
        target = (root / name).parent / path
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"
    assert "@@" not in text


def test_the_page_on_many_builds_has_the_simulated_figures(root: Path) -> None:
    result = json.loads((root / "tests/benchmarks/results/matrix_scale.json").read_text())
    text = page(root, "docs/matrix.md")
    for nodes, row in result["rows"].items():
        hours = f"{row['hours']:,.2g}" if row["hours"] < 100 else f"{row['hours']:,.0f}"
        assert f"| {int(nodes):,} | {hours} | {row['efficiency']:.0%} |" in text
    assert f"takes {result['first']:.0f} s and each later one {result['later']:.0f} s" in text


def test_the_command_table_of_the_readme_is_the_program_s(root: Path) -> None:
    """Every command has its row, and each option in a row is one of that command."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    block = page(root, "README.md").split("## The command line")[1].split("```")[1]
    rows = [part for part in re.split(r"^(?=erasec )", block, flags=re.MULTILINE) if part.strip()]
    assert {row.split()[1] for row in rows} == commands.keys()
    for row in rows:
        command = commands[row.split()[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", row)) <= known, row
    (listed,) = (row.split()[2] for row in rows if row.startswith("erasec list"))
    assert listed == commands["list"].params[0].metavar


def test_the_page_on_architecture_lists_every_room(root: Path) -> None:
    rooms = re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", page(root, "docs/architecture.md"), re.MULTILINE)
    packages = (path.parent for path in (root / "compiler").glob("*/__init__.py"))
    folders = {package.name for package in packages if not package.is_symlink()}
    modules = {path.stem for path in (root / "compiler").glob("*.py")} - {"__init__", "__main__"}
    assert sorted(rooms) == sorted(folders | modules)


def test_the_table_of_renamed_options_is_that_of_the_code(root: Path) -> None:
    text = page(root, "CHANGELOG.md")
    rows = re.findall(r"^\| ([^|]*) \| `(\w+)` \| `(\w+)` \|$", text, re.MULTILINE)
    listed = {(name, old, new) for names, old, new in rows for name in re.findall(r"`([^`]+)`", names)}
    kinds: dict[str, Any] = {name: registry.load_pass(name) for name in registry.PASSES}
    kinds |= {name: registry.load_target(name) for name in registry.TARGETS}
    assert listed == {(name, old, new) for name, kind in kinds.items() for old, new in kind.renamed.items()}
