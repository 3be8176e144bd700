"""What a build tells of itself in its report, gathered from the model, the folders and this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import file_digest
from erasec.model import sidecar as extras
from erasec.reporting import report as reports

if TYPE_CHECKING:
    from erasec.judging.validate import Evidence
    from erasec.model.view import Model

PACKAGES = ("erasec", "torch", "diffusers", "transformers", "onnx", "onnxruntime")


def moves(model: Model) -> tuple[reports.SiteMove, ...]:
    """How far every edited site moved from its stored weight."""
    found = []
    for site in model.parameters:
        deltas = model.deltas(site)
        if deltas:
            stored = model.stored(site).double()
            moved = float((model.weight(site) - stored).norm())
            # A bias is one column, a kernel a matrix of its outputs.
            rank = min(sum(delta.rank for delta in deltas), site.shape[0], max(1, stored.numel() // site.shape[0]))
            found.append(
                reports.SiteMove(
                    site.key, site.block, site.attn, site.proj, site.shape, float(stored.norm()), moved, rank
                )
            )
    return tuple(found)


def carried(built: Folder, keys: list[str]) -> dict[str, Any]:
    """What a built folder carries beside weights, opened for ``keys``, as ``Report.extras`` tells it."""
    found = extras.read(built.root)
    memories = [
        {"attention": item.attention, "mode": item.mode, "rows": len(item.keys), "weight": item.weight,
         "until": item.until}
        for item in found.memories
    ]  # fmt: skip
    return {"memories": memories, "tokens": list(found.tokens), "negative": found.negative, "keys": keys}


def pairs(evidence: Evidence) -> tuple[reports.Pair, ...]:
    """Every question with its two pictures."""
    return tuple(
        reports.Pair(
            question.group, question.prompt, question.seed, evidence.before[row], evidence.after[row],
            question.looked_for, bool(evidence.shown_before[row]), bool(evidence.shown_after[row]),
        )
        for row, question in enumerate(evidence.questions)
    )  # fmt: skip


def written(target: str, folder: Path) -> reports.Written:
    """Sizes and digests of all files of an artifact."""
    files = Folder(folder).files()
    return reports.Written(
        target,
        target,
        {name.as_posix(): ((folder / name).stat().st_size, file_digest(folder / name)) for name in files},
    )


def environment() -> dict[str, str]:
    """What the build ran on: versions and the machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
