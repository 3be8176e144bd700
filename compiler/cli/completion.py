"""What a shell completes: the names of models, concepts, passes, targets, judges and probes. Needs no library that
computes, because a shell waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import typer

from erasec import registry
from erasec.errors import ErasecError


def models() -> list[str]:
    """Bundled models and aliases. A shell completes folders and files itself where no name fits."""
    from erasec.family import HUB
    from erasec.model.loading import BUNDLED

    return [*BUNDLED, *HUB]


def concepts(ctx: typer.Context) -> list[str]:
    """Bundled concepts; for a model of a reference world also those of that world."""
    from erasec.model.loading import BUNDLED
    from erasec.recipe.concept import library

    given = [ctx.params.get("model"), *ctx.args]  # the model is among the latter while an option lacks its value
    return sorted(library(next((BUNDLED[word] for word in given if word in BUNDLED), "")))


def passes() -> list[str]:
    return _names(registry.passes, registry.PASSES)


def targets() -> list[str]:
    return _names(registry.targets, registry.TARGETS)


def judges() -> list[str]:
    return _names(registry.judges, registry.JUDGES)


def probes() -> list[str]:
    return _names(registry.probes, registry.PROBES)


def runtimes() -> list[str]:
    return ["auto", *_names(registry.runtimes, registry.RUNTIMES)]


def suites() -> list[str]:
    from erasec.audit.suites import SUITES

    return [*SUITES]


def _names(registered: Callable[[], Mapping[str, str]], own: Mapping[str, str]) -> list[str]:
    try:
        return list(registered())
    except ErasecError:  # of two packages with one name: a command says so, and a shell cannot
        return list(own)
