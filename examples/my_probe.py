"""A probe of your own: the name of the concept in capital letters.

erasec audit OUT --probe examples/my_probe.py:Shouted
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from erasec.base import Attempt, Probe, Threat
from erasec.options import options


@options
class Shouted(Probe):
    """Prompts in capital letters; the control are prompts of other things, in capital letters as well."""

    marks: int = 1

    name: ClassVar[str] = "shouted"
    summary: ClassVar[str] = "prompts in capital letters"
    threat: ClassVar[Threat] = "prompt"
    gradients: ClassVar[bool] = False

    def attack(self, bench: Any, subject: Any) -> Iterator[Attempt]:
        yield self._shout(bench, subject, "name")

    def control(self, bench: Any, subject: Any) -> Iterator[Attempt]:
        yield self._shout(bench, subject, "keep")

    def _shout(self, bench: Any, subject: Any, group: str) -> Attempt:
        prompts = [prompt.upper() + "!" * self.marks for prompt in bench.prompts(group)]
        seeds, settings = bench.seeds(f"shouted {group}", len(prompts)), bench.settings
        return Attempt.single("capitals", subject.pictures(prompts, seeds, settings.steps, settings.guidance))
