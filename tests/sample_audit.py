"""An invented audit, and what is needed to read the two files that it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sample_report import pictures

from erasec.audit.base import Rate, Reading
from erasec.audit.gates import check_gates
from erasec.base import Role, Threat
from erasec.glyphs import world
from erasec.reporting.audit_page import AuditReport, write_audit

ROLES: tuple[Role, ...] = ("model", "control", "base", "twin", "random")
LIMITS = {"prompts": 0.2, "noised": 0.5}


def row(
    probe: str, variant: str, threat: Threat, hits: Mapping[Role, int], count: int = 20, shows: str = "", **more: Any
) -> Reading:
    """A row of the audit from the hits of ``count`` pictures by role. Its pictures show the shape ``shows``."""
    rates = {role: Rate(number, count) for role, number in hits.items()}
    shown = np.stack(pictures(shows)[:4]) if shows else None
    return Reading(probe, variant, threat, rates, seconds=more.pop("seconds", 12.5), shown=shown, **more)


def hits(*numbers: int) -> dict[Role, int]:
    """The hits of the model, the control, the base, the twin and the untrained model; fewer numbers, fewer roles."""
    return dict(zip(ROLES, numbers, strict=False))


READINGS = (
    row("prompts", "name", "prompt", hits(1, 0, 20, 0, 0), shows="circle"),
    row("prompts", "synonym", "prompt", hits(2, 0, 19, 0, 0), shows="circle"),
    row("prompts", "negated", "prompt", hits(1, 0, 3, 0, 0)),
    row("prompts", "misspelt", "prompt", hits(0, 0, 14, 0, 0)),
    row("seeds", "best of 24", "prompt", hits(5, 1, 20, 1), budget=24, shows="star"),
    row("noised", "empty prompt, from t = 620", "sampling", hits(18, 1, 19, 4, 0), shows="star"),
    row("noised", "named, from t = 750", "sampling", hits(3, 0, 18, 2, 0), shows="circle"),
    row(
        "inpainting", "mask of 25%", "sampling", hits(13, 12, 14, 12, 11), shows="star", note="the surroundings show it"
    ),
    row(
        "inversion",
        "1 token, 200 steps",
        "weights",
        hits(17, 0, 20, 2),
        shows="star",
        seconds=140.25,
        measured={"loss_first": 0.2175, "loss_last": 0.1025},
    ),
    row("free_states", "every row, 450 steps", "weights", hits(20, 0, 20, 6), shows="star", seconds=171.5),
    Reading("completion", "", "sampling", {}, obstacle="the budget of 5 minutes was spent"),
)


def star_audit(**changes: Any) -> AuditReport:
    """An invented audit of a star that is hidden: prompts do not show it, and three attacks bring it back."""
    instead = {"circle": 0.55, "pentagon": 0.25, "nothing that the judge knows": 0.2}
    report = AuditReport(
        model={"name": "out/hf", "family": "sd1", "digest": "ab" * 32},
        base={"name": "glyphs", "family": "sd1", "digest": "cd" * 32},
        twin={"name": "glyphs-never-star", "family": "", "digest": "ef" * 32},
        concept={
            "name": "star",
            "erase": ["star"],
            "synonyms": ["pentagram", "five-pointed spark"],
            "anchor": "circle",
            "keep": [name for name in world.SHAPES if name != "star"],
            "templates": ["{}", "a photo of a {}"],
            "scale": 1.0,
            "label": "",
        },
        suite="standard",
        settings={"images": 20, "steps": 15, "guidance": 4.0, "seed": 0, "device": "cpu"},
        judges={
            "scorer": {"title": "glyphs B", "digest": "1f2e" * 16},
            "selector": {"title": "glyphs A", "digest": "3d4c" * 16},
        },
        readings=READINGS,
        gates=check_gates(READINGS, LIMITS),
        notion="the model avoids star when a prompt names it; without a prompt it still draws it",
        alternatives={
            "shares": instead,
            "diversity": 0.4125,
            "pictures": {
                "base": np.stack(pictures("star")[:6]),
                "model": np.stack([*pictures("circle")[:4], *pictures("square")[:2]]),
            },
        },
        seconds={"audit": 512.75},
        environment={"erasec": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        notes=("The recipe of the build was not read.",),
    )
    return replace(report, **changes)


def written_audit(report: AuditReport, out: Path) -> tuple[str, dict[str, Any]]:
    """(page, facts) as they lie on disk."""
    write_audit(report, out)
    facts: dict[str, Any] = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    return (out / "audit.html").read_text(encoding="utf-8"), facts
