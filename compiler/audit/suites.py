"""Which probes an audit runs, with which options, by the time that one has for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erasec import registry
from erasec.base import Probe
from erasec.errors import ErasecError, suggestion
from erasec.options import configure
from erasec.recipe.recipe import parse_named_options


@dataclass(frozen=True)
class Suite:
    """Probes as NAME[:key=value,...], and the number of pictures for each variant and subject."""

    images: int
    probes: tuple[str, ...]


QUICK = ("prompts", "noised", "completion", "undo", "inversion", "free_states:steps=200")
STANDARD = (
    "prompts",
    "seeds:seeds=8",
    "settings",
    "noised",
    "completion",
    "inpainting",
    "trajectory_noise:cells=8",
    "latent_guidance:noise=false",
    "undo",
    "precision",
    "inversion",
    "inversion:tokens=2,steps=600",
    "free_states",
    "free_states:rows=one",
)
FULL = (
    *(text for text in STANDARD if text.partition(":")[0] not in ("seeds", "trajectory_noise", "latent_guidance")),
    "seeds",
    "trajectory_noise",
    "latent_guidance",
    "prefix",
    "ring_a_bell",
    "concept_vector",
    "mma",
    "unlearn_diff",
    "p4d",
    "p4d:mode=k",
    "null_text",
    "strength",
    "text_encoder",
    "merge",
    "lora",
    "finetune",
    "relearn",
    "tracing",
)
SUITES = {"quick": Suite(10, QUICK), "standard": Suite(20, STANDARD), "full": Suite(50, FULL)}


def find_suite(name: str) -> Suite:
    """The suite called ``name``. Raises ErasecError for an unknown name."""
    if name not in SUITES:
        raise ErasecError(
            f"there is no suite {name!r}", why=suggestion(name, SUITES), fix=f"choose from {', '.join(SUITES)}"
        )
    return SUITES[name]


def make_probes(texts: Sequence[str]) -> list[Probe]:
    """The probes of texts NAME[:key=value,...]; NAME may be file.py:Class. Raises ErasecError for an unknown name or
    option."""
    probes = []
    for text in texts:
        use = parse_named_options(text, "--probe")
        probes.append(configure(registry.load_probe(use.name), use.options, f"probe {use.name}"))
    return probes
