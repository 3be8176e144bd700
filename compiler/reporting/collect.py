"""Collects the facts of a report from the edited model, the built folders, the pictures and this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint import manifest
from erasec.checkpoint.folder import Folder, only_variant
from erasec.checkpoint.inputs import LIBRARIES, versions
from erasec.closed_form.reach import reach
from erasec.family import HUB
from erasec.graphs.signature import DENOISERS, pixel_unit
from erasec.ldm.single_file import SingleFile
from erasec.model.loading import BUNDLED, NOTICE
from erasec.model.sidecar import read_extras
from erasec.reporting.front_matter import read_license
from erasec.reporting.report import ArtifactRecord, BaseRecord, Pair, SiteMove

if TYPE_CHECKING:
    from erasec.judging.evidence import Evidence
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

PACKAGES = ("erasec", *LIBRARIES, "onnx", "onnxruntime")


def site_moves(model: Model) -> tuple[SiteMove, ...]:
    """The change of every edited site, relative to its stored weight."""
    moves = []
    for site in model.edited_sites:
        deltas, stored = model.deltas(site), model.stored_weight(site).double()
        moved = float((model.weight(site) - stored).norm())
        # A bias is a matrix of one column, a kernel a matrix with one row per output.
        rank = min(sum(delta.rank for delta in deltas), site.shape[0], max(1, stored.numel() // site.shape[0]))
        moves.append(
            SiteMove(site.key, site.block, site.attn, site.proj, site.shape, float(stored.norm()), moved, rank)
        )
    return tuple(moves)


def reaches(model: Model, concepts: Iterable[Concept]) -> tuple[dict[str, Any], ...]:
    """How near a text state comes to the outputs that each concept had before the edits of ``model``; without concepts
    whose edits leave the matrices that read text states as they are."""
    return tuple(asdict(item) for item in reach(model, tuple(concepts)))


def carried_extras(built: Folder, keys: list[str]) -> dict[str, Any]:
    """The field ``Report.extras``: what a built folder carries in addition to weights; ``keys`` are concepts."""
    extras = read_extras(built.root)
    memories = [
        {
            "attention": memory.attention,
            "mode": memory.mode,
            "rows": len(memory.keys),
            "weight": memory.weight,
            "until": memory.until,
        }
        for memory in extras.memories
    ]
    return {"memories": memories, "tokens": list(extras.tokens), "negative": extras.negative, "keys": keys}


def picture_pairs(evidence: Evidence) -> tuple[Pair, ...]:
    """Every question with its pictures before and after the edit."""
    return tuple(
        Pair(
            question.group,
            question.prompt,
            question.seed,
            evidence.before[row],
            evidence.after[row],
            question.looked_for,
            bool(evidence.shown_before[row]),
            bool(evidence.shown_after[row]),
            evidence.concepts[row] if evidence.concepts else "",
        )
        for row, question in enumerate(evidence.questions)
    )


def written_files(target: str, folder: Path) -> ArtifactRecord:
    """The sizes and digests of all files that a target wrote, and what its users must know to load and run them."""
    records = manifest.records(folder, [name.as_posix() for name in Folder(folder).files()])
    # The configs of graphs lie beside them, or, for Triton, in a folder for its clients.
    graphs = [Folder(root) for root in (folder, folder / "client") if (root / "vae_decoder" / "config.json").is_file()]
    return ArtifactRecord(
        target,
        target,
        {name: (record.bytes, record.sha256) for name, record in records.items()},
        only_variant(folder),
        _pixel_unit(graphs[0]) if graphs else 0,
    )


def _pixel_unit(folder: Folder) -> int:
    denoiser = next((name for name in DENOISERS if (folder.root / name / "config.json").is_file()), DENOISERS[0])
    return pixel_unit(folder.config(denoiser), folder.config("vae_decoder"))


def base_record(model: Model) -> BaseRecord:
    """How diffusers loads the model that was edited."""
    source = model.source
    kind = "hub" if model.revision else "file" if isinstance(source, SingleFile) else "folder"
    # Only of bundled models: the text of another folder might pretend to be part of the card.
    notice = source.root / NOTICE
    text = notice.read_text(encoding="utf-8").strip() if model.name in BUNDLED and notice.is_file() else ""
    return BaseRecord(
        "bundled" if model.name in BUNDLED else kind,
        HUB.get(model.name, model.name) if model.revision else Path(model.name).name,
        source.index["_class_name"],
        source.variant or only_variant(source.root),
        text,
        {} if model.name in BUNDLED or kind == "file" else read_license(source.root),
    )


def environment() -> dict[str, str]:
    """The versions of Python and of the libraries, and the machine."""
    facts = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    return facts | {name: version for name, version in versions(PACKAGES).items() if version}
