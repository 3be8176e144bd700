"""Sentences about texts of which text encoders read only the beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from erasec.model.view import Model

WORDS = 4  # words that a message shows before a cut
SHOWN = 40  # characters of a phrase that a message shows


def where_cut(read: Mapping[str, str], text: str) -> str:
    """Which text encoders read only the beginning of ``text``, and where they stop; "" if all read the whole text.

    ``read`` is the part that each text encoder reads.
    """
    stops: dict[str, list[str]] = {}
    for encoder, part in read.items():
        if len(part.rstrip()) < len(text.rstrip()):
            stops.setdefault(part, []).append(encoder)
    return ", ".join(
        f"{' and '.join(names)} {'read' if len(names) > 1 else 'reads'} it up to {' '.join(part.split()[-WORDS:])!r}"
        for part, names in stops.items()
    )


def summarise_cuts(texts: Sequence[str], model: Model) -> str:
    """How many of ``texts`` are cut, and where the first of these is; "" if none is."""
    cuts = [(text, cut) for text in texts if (cut := where_cut(model.text_read(text), text))]
    if not cuts:
        return ""
    text, cut = cuts[0]
    return f"{len(cuts)} of {len(texts)} are cut. Of {shorten(text)!r}, {cut}."


def shorten(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}..."
