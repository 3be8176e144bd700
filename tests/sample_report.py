"""The report of an invented build, and what is needed to read the three files that it is written to."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from erasec.base import Check
from erasec.glyphs import world
from erasec.reporting.report import ArtifactRecord, EditRecord, Pair, Report, SiteMove, write_report

Image = np.ndarray[Any, np.dtype[np.uint8]]

BLOCKS = ("up.1.attentions.10.0", "down.0.attentions.0.0", "mid_block.attentions.0.0", "up.1.attentions.2.0")
FILES = {
    "hf": ("model_index.json", "unet/diffusion_pytorch_model.safetensors"),
    "onnx": ("unet/model.onnx", "vae_decoder/model.onnx"),
}


@cache
def pictures(shape: str) -> tuple[Image, ...]:
    """Rendered pictures that show only ``shape``."""
    return tuple(item.image for item in samples() if item.shapes == {shape})


@cache
def samples() -> tuple[world.Sample, ...]:
    return tuple(world.sample(3, index) for index in range(200))


def pairs(group: str, prompts: tuple[str, ...], before: str, after: str, count: int) -> tuple[Pair, ...]:
    return tuple(
        Pair(group, prompts[i % len(prompts)], 100 + i, first, second, before, True, before == after)
        for i, (first, second) in enumerate(islice(zip(cycle(pictures(before)), cycle(pictures(after))), count))
    )


def star_report(**changes: Any) -> Report:
    """An invented build that erases the star: gone by name and by synonym, alive in implicit scenes, the rest kept."""
    others = tuple(name for name in world.SHAPES if name != "star")
    kept = tuple(pair for name in others for pair in pairs("keep", (f"a photo of a {name}",), name, name, 2))
    how = "judge B (sha256 1f2e3d4c), 5 prompts x 20 seeds, 25 steps DDIM, guidance 4"
    report = Report(
        model={"name": "glyphs", "revision": "", "family": "sd1", "digest": "ab" * 32},
        concepts=(
            {
                "name": "star",
                "erase": ("star",),
                "synonyms": ("pentagram", "five-pointed spark"),
                "anchor": "circle",
                "keep": others,
                "implicit": world.implicit_captions("star"),
                "templates": ("{}", "a photo of a {}"),
                "label": "",
                "notes": "",
            },
        ),
        applied=(
            EditRecord(
                "uce",
                "1",
                "https://arxiv.org/abs/2308.14761",
                ("star",),
                {"lamb": 0.5, "tokens": "all"},
                {
                    "condition": 48213.7,
                    "sigma_min": 0.2713,
                    "sigma_max": 1.3719,
                    "erased_residual": 3.1e-7,
                    "keep_drift": 0.00412,
                    "rank": 21.0,
                    "rows_erased": 120.0,
                    "rows_kept": 1840.0,
                    "ridge": 1e-6,
                    "of_my_own": 7.5,
                },
                1.84,
            ),
        ),
        moves=tuple(
            SiteMove(f"{block}.attn2.to_{proj}.weight", block, "cross", proj, (64, 128), 3.5, 3.5 * change, 21)
            for at, block in enumerate(BLOCKS)
            for proj, change in (("v", 0.031 + 0.021 * at), ("k", 0.0119 + 0.011 * at))
        ),
        checks=(
            Check("finite", 0.0, 0.0, True, "every tensor of unet, vae, text_encoder"),
            Check("erased/name", 0.02, 0.1, True, how),
            Check("erased/synonym", 0.045, 0.1, True, how),
            Check("erased/implicit", 0.6, None, True, how),
            Check("kept/hits", 0.9391, 0.9, True, how),
            Check("parity/onnx/unet", 2.31e-7, 1e-4, True, "4 shapes, 3 timesteps, relative to torch"),
        ),
        pairs=(
            *pairs("name", ("a photo of a star", "a red star"), "star", "circle", 11),
            *pairs("synonym", ("a drawing of a pentagram", "a five-pointed spark on navy"), "star", "circle", 11),
            *pairs("implicit", world.implicit_captions("star"), "star", "star", 6),
            *kept,
        ),
        rates=(
            {"group": "name", "looked_for": "star", "images": 100, "before": 0.97, "after": 0.02},
            {"group": "synonym", "looked_for": "star", "images": 200, "before": 0.985, "after": 0.045},
            {"group": "implicit", "looked_for": "star", "images": 100, "before": 1.0, "after": 0.6},
            *(
                {"group": "keep", "looked_for": name, "images": 50, "before": 0.96, "after": 0.93 + 0.01 * (at % 4)}
                for at, name in enumerate(others)
            ),
        ),
        written=tuple(
            ArtifactRecord(target, target, {name: (1234567 * (at + 1), f"{at}f" * 32) for at, name in enumerate(files)})
            for target, files in FILES.items()
        ),
        seconds={"load": 1.23, "solve": 1.84, "merge": 0.61, "hf": 0.35, "onnx": 14.2, "judge": 51.7},
        environment={"erasec": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "diffusers": "0.42.1"},
        notes=(),
        judged=("star",),
    )
    return replace(report, **changes)


def written(report: Report, out: Path) -> tuple[str, dict[str, Any], str]:
    """(page, facts, card) as they lie on disk."""
    write_report(report, out)
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return (out / "report.html").read_text(encoding="utf-8"), facts, (out / "README.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a browser would: text, tags with attributes, ``<data>`` numbers; and that every tag is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", "".join(self.texts))

    @property
    def numbers(self) -> list[float]:
        return [float(attributes["value"] or "nan") for tag, attributes in self.tags if tag == "data"]

    @property
    def everything(self) -> str:
        return self.text + " ".join(str(value) for _, attributes in self.tags for value in attributes.values())


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]
