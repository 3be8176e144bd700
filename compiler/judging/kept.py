"""What an edit keeps, measured without labels: pictures of the same prompts and seeds before and after it.

Four measures, each a check:

* ``agreement``: the loss of CLIP score, the mean cosine of picture and prompt (Hessel et al., 2021, without its factor
  of 2.5). Only with a judge that compares pictures with prompts.
* ``drift``: the mean absolute change of a pixel.
* ``lpips``: the mean perceptual distance of two pictures (``judging.perceptual``).
* ``cmmd`` and ``kid``: the distance of the two distributions (``judging.distribution``). Only with a judge that embeds
  pictures, and with enough of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from erasec.base import Check
from erasec.judging import distribution, intervals, perceptual
from erasec.judging.captions import LEAST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from erasec.base import Images, Judge
    from erasec.recipe.recipe import Limits


@dataclass(frozen=True)
class Pictures:
    """Pictures of the same prompts and seeds before and after an edit, (n, height, width, 3) with n > 0.

    ``group`` is "kept" for prompts that name other things than what was erased, and "captions" for captions.
    ``agreement`` is the cosine of each picture and its prompt before and after, (n,) each, if a judge computed it.
    ``device`` is the one on which LPIPS is computed, as torch names it.
    """

    group: str
    before: Images
    after: Images
    agreement: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    device: str = "cpu"


def kept_checks(pictures: Pictures, judge: Judge | None, limits: Limits, conditions: str) -> tuple[Check, ...]:
    """The checks of what is kept, named ``GROUP/MEASURE``; ``conditions`` says how the pictures were made.

    A measure that is not possible here has no check, unless it has a limit: its check fails then. ``cmmd`` and ``kid``
    of fewer pictures than ``captions.LEAST`` have none in any case.
    """
    return tuple(
        Check.at_most(f"{pictures.group}/{name}", value, limit, f"{how}; {conditions}")
        for name, value, limit, how in _measures(pictures, judge, limits)
    )


def not_measured(judge: Judge | None) -> tuple[str, ...]:
    """A sentence for each measure that this installation cannot make, for models that know everyday scenes."""
    why = "" if judge is not None and not judge.everyday else perceptual.unavailable()
    return (f"LPIPS, the perceptual distance of pictures before and after, was not measured: {why}.",) if why else ()


def _measures(
    pictures: Pictures, judge: Judge | None, limits: Limits
) -> Iterator[tuple[str, float, float | None, str]]:
    """The name, value, limit and explanation of each check."""
    captions = pictures.group == "captions"
    if pictures.agreement is not None:
        before, after = pictures.agreement
        how = f"loss of mean cosine similarity of picture and prompt, {before.mean():.3f} to {after.mean():.3f}"
        if captions:
            how += (
                f", mean of pairs {intervals.mean(before - after).text(4)} with 95 % interval, {len(before)} captions"
            )
        loss = float(before.mean() - after.mean())
        yield "agreement", loss, limits.captions if captions else limits.agreement, how
    # An edit may paint another picture of a caption, as long as it fits the caption: that drift is reported.
    moved = np.abs(pictures.after.astype(np.float64) - pictures.before).mean() / 255
    how = "mean absolute change of a pixel, full scale 1, same seeds"
    yield "drift", float(moved), None if captions else limits.drift, how
    yield from _perceptual(pictures, judge, limits)
    yield from _distances(pictures, judge, limits)


def _perceptual(
    pictures: Pictures, judge: Judge | None, limits: Limits
) -> Iterator[tuple[str, float, float | None, str]]:
    # LPIPS was fitted to photographs: on the pictures of a synthetic world it is computed only if its limit is set.
    wanted = limits.lpips is not None or judge is None or judge.everyday
    if wanted and (why := perceptual.unavailable()):
        if limits.lpips is not None:
            yield "lpips", math.nan, limits.lpips, f"not measured: {why}"
    elif wanted:
        distances = perceptual.distances(pictures.before, pictures.after, pictures.device)
        text = intervals.mean(distances).text()
        how = f"mean LPIPS of pairs, AlexNet, full size, same seeds, {text} with 95 % interval, {len(distances)} pairs"
        yield "lpips", float(distances.mean()), limits.lpips, how


def _distances(
    pictures: Pictures, judge: Judge | None, limits: Limits
) -> Iterator[tuple[str, float, float | None, str]]:
    count = len(pictures.before)
    if count < LEAST:  # a plan refuses limits on them where there are not enough captions
        return
    before = judge.embed(pictures.before) if judge is not None else None
    if judge is None or before is None:
        for name, limit in (("cmmd", limits.cmmd), ("kid", limits.kid)):
            if limit is not None:
                yield name, math.nan, limit, "not measured: no judge embeds pictures"
        return
    after = judge.embed(pictures.after)
    assert after is not None  # a judge embeds all pictures or none
    for name, limit, distance in (("cmmd", limits.cmmd, distribution.cmmd), ("kid", limits.kid, distribution.kid)):
        measured, noise = distance(before, after), distribution.halves(before, distance)
        how = (
            f"{name.upper()} of embeddings by {judge.title}, {measured.text(4)} with 95 % interval, {count} pairs; two "
            f"halves of the pictures before are {noise.text(4)} apart"
        )
        yield name, measured.value, limit, how
