"""Writes the report of a build: report.html for readers, report.json for programs, README.md as the model card."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from erasec.checkpoint.manifest import FileRecord, combined_digest
from erasec.checkpoint.safetensors import atomic_write
from erasec.family import HUB
from erasec.reporting import charts
from erasec.reporting.facts import ALIVE, GROUPS, facts_of, plain, title
from erasec.reporting.format import about
from erasec.reporting.read import CARD, PAGE, REPORT
from erasec.reporting.wording import FILTERS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from erasec.base import Check


# "not judged": no check failed, and no judge could see one of the concepts.
Outcome = Literal["passed", "not judged", "rejected"]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and seed, before and after the edit, (height, width, 3) uint8.

    ``shown_before`` and ``shown_after`` say whether the judge saw the label ``looked_for``; where that is "", no judge
    looked. ``concept`` is the concept that the prompt is about.
    """

    group: str  # "name", "synonym", "implicit", "keyed" or "keep"
    prompt: str
    seed: int
    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    looked_for: str
    shown_before: bool
    shown_after: bool
    concept: str = ""


@dataclass(frozen=True)
class SiteMove:
    """The change of one site: Frobenius norms of its weight (``size``) and of the change (``moved``), and the rank."""

    key: str
    block: str
    attn: str
    proj: str
    shape: tuple[int, ...]
    size: float
    moved: float
    rank: int

    @property
    def change(self) -> float:
        """``moved`` over ``size``."""
        return charts.relative(self.moved, self.size)


@dataclass(frozen=True)
class EditRecord:
    """One edit. ``limits`` is that of the pass; ``curves`` are values measured during training, by name. ``origins``
    says where the value of each option in ``params`` comes from: "flag", "recipe", "model", "family" or "class".
    ``stored`` says that an earlier command had solved the same, and ``seconds`` are those of reading it again.
    ``digest`` is that of ``model.edit.edit_digest``."""

    by: str
    version: str
    paper: str
    concepts: tuple[str, ...]
    params: dict[str, Any]
    stats: dict[str, float]
    seconds: float
    limits: str = ""
    curves: dict[str, list[float]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    stored: bool = False
    digest: str = ""


@dataclass(frozen=True)
class ArtifactRecord:
    """One artifact. ``files`` maps relative paths to (bytes, sha256).

    ``variant`` is the one that loaders of a diffusers folder must be given, or "". The heights and widths of pictures
    that graphs make are multiples of ``multiple`` pixels; 0 means that the artifact has no graphs.
    """

    target: str
    path: str
    files: dict[str, tuple[int, str]]
    variant: str = ""
    multiple: int = 0


@dataclass(frozen=True)
class BaseRecord:
    """How diffusers loads the base model. ``kind`` is "hub", "bundled", "folder" or "file", and ``name`` is its name
    without its path. ``pipeline`` is the class, and ``variant`` the one that a folder must be given, or "". ``notice``
    is the Markdown text that copies of a bundled model must carry, "" if there is none."""

    kind: str
    name: str
    pipeline: str
    variant: str = ""
    notice: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. ``judged`` are the concepts that a judge looked for in pictures; ``outcome``, the
    headline of the build, follows from them and from the checks.

    ``extras`` is what the build carries in addition to weights: "memories", each a dict of attention, mode, rows,
    weight and until; "tokens", the names of new tokens; "negative", a prompt; and "keys", the concepts whose keys are
    in the build. Entries that are empty may be left out. ``earlier`` are concepts that were erased from the model
    before. ``base`` may be left out where no target was written that needs it. ``prompt_files`` are hit rates by
    category, see ``judging.prompt_groups.table``. ``audits`` has the facts of the audit of each concept, as
    ``audit_page.AuditReport.facts`` returns them.
    """

    model: dict[str, str]  # name, revision, family, digest
    concepts: tuple[dict[str, Any], ...]  # the Concept fields
    applied: tuple[EditRecord, ...]
    moves: tuple[SiteMove, ...]
    checks: tuple[Check, ...]
    pairs: tuple[Pair, ...]
    rates: tuple[dict[str, Any], ...]  # prompt group, looked_for, images, before, after: hit rates in [0, 1]
    written: tuple[ArtifactRecord, ...]
    seconds: dict[str, float]  # by step of the build
    environment: dict[str, str]  # erasec, python, torch, diffusers, ... versions
    notes: tuple[str, ...]  # sentences that every reader must know
    judged: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[dict[str, Any], ...] = ()  # the Concept fields
    rebuild: str = "erasec build recipe.toml"  # the command that builds the same again
    base: BaseRecord | None = None
    prompt_files: tuple[dict[str, Any], ...] = ()
    estimated: dict[str, list[float]] = field(default_factory=dict)  # by step: the least and the most seconds
    audits: tuple[dict[str, Any], ...] = ()
    # What the build wrote that can undo the erasure: path, whether it is in the release (inside), and how (undoes).
    undoing: tuple[dict[str, Any], ...] = ()
    reach: tuple[dict[str, Any], ...] = ()  # the fields of closed_form.reach.Reach, for each concept that has one
    inputs: str = ""  # a digest of everything that the build depends on

    @property
    def files(self) -> dict[str, FileRecord]:
        """The records of the files of all artifacts, by their paths in the build."""
        return {
            f"{item.path}/{name}": FileRecord(bytes=size, sha256=digest)
            for item in self.written
            for name, (size, digest) in item.files.items()
        }

    @property
    def digest(self) -> str:
        """One sha256 for the files of all artifacts, by which the files of a build name what they are about."""
        return combined_digest(self.files)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """The concepts, erased or restored by a key, about which no judge decided anything."""
        names = (*(concept["name"] for concept in self.concepts), *self.extras.get("keys", ()))
        looked = any(rate["group"] != "keep" for rate in self.rates) and bool(self.checks)
        return tuple(name for name in names if not (looked and name in self.judged))

    @property
    def outcome(self) -> Outcome:
        """The state of the build: everything that says whether it is good says this, and nothing else."""
        return "rejected" if self.failed else "not judged" if self.unjudged else "passed"

    @property
    def passed(self) -> bool:
        """Whether a judge saw every concept and no check failed."""
        return self.outcome == "passed"


SHOWN, SHOWN_KEPT = 8, 12
SECTIONS = 16  # concepts whose pictures are shown: the page holds all of its pictures, and a browser has to open it
SIDE = 320  # pixels; larger pictures are reduced, because a report with 512 px pictures would have 40 MB
OPEN_NOTES = 8  # notes that are read without opening the others


def write_report(report: Report, out: Path) -> None:
    """Write ``report.html``, ``report.json`` and ``README.md`` into ``out``.

    Each file is written completely or not at all. The same report gives the same bytes.
    """
    facts = facts_of(report)
    environment = templates()
    page = environment.get_template("report.html.j2").render(
        facts,
        gallery=_gallery(report),
        groups=GROUPS,
        rebuild=report.rebuild,
        side=SIDE,
        alive=ALIVE,
        open_notes=OPEN_NOTES,
        charts=charts,
        about=about,
        heat=charts.heat_map(report.moves),
        reduced=any(max(pair.before.shape[:2]) > SIDE for pair in report.pairs),
    )
    base_model = HUB.get(report.model["name"], title(report.model))
    card = environment.get_template("card.md.j2").render(
        facts,
        groups=GROUPS,
        base_model=base_model,
        base=report.base,
        rebuild=report.rebuild,
        open_notes=OPEN_NOTES,
    )
    write_text(out / PAGE, page)
    write_text(out / REPORT, json.dumps(plain(facts), indent=2, sort_keys=True, allow_nan=False) + "\n")
    write_text(out / CARD, card)


def templates() -> Environment:
    """The templates of the pages, with the filters that all of them have. Pages of HTML escape what they are given."""
    environment = Environment(
        loader=FileSystemLoader(str(resources.files("erasec.reporting") / "templates")),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    return environment


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _gallery(report: Report) -> list[dict[str, Any]]:
    """The first pairs of each group, in the order of generation, by concept where there are several, of the first
    ``SECTIONS`` of them. Pairs are never selected by content. What must stay is not the matter of one concept."""
    sections = []
    several = len({pair.concept for pair in report.pairs}) > 1
    for group in dict.fromkeys([*GROUPS, *(pair.group for pair in report.pairs)]):
        title, about = GROUPS.get(group, (group, ""))
        members = [pair for pair in report.pairs if pair.group == group]
        own = several and group != "keep"
        names = list(dict.fromkeys(pair.concept if own else "" for pair in members))
        for concept in names[:SECTIONS]:
            pairs = [pair for pair in members if not own or pair.concept == concept]
            shown = pairs[: SHOWN_KEPT if group == "keep" else SHOWN]
            items = [(pair, png(pair.before), png(pair.after)) for pair in shown]
            sections.append(
                {
                    "group": group,
                    "title": f"{title}: {concept}" if concept else title,
                    "about": about,
                    "total": len(pairs),
                    "judged": sum(bool(pair.looked_for) for pair in pairs),
                    # The hit rate of a group is that of all its concepts.
                    "rated": not any(pair.looked_for for pair in members if own and pair.concept != concept),
                    "items": items,
                    "further": len(names) - SECTIONS if concept == names[:SECTIONS][-1] else 0,
                }
            )
    return sections


def png(image: NDArray[np.uint8]) -> str:
    """The image (height, width, 3) as a data URI, reduced to ``SIDE`` pixels."""
    picture = Image.fromarray(image)
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG")  # optimize=True takes eight times as long and saves a twentieth
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
