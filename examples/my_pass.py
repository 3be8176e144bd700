"""A pass of your own in one file: ``erasec build glyphs --erase star --pass examples/my_pass.py:ProjectOut``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from erasec.base import Context, Pass
from erasec.family import Site
from erasec.model.edit import Edit, LowRank
from erasec.model.view import Model
from erasec.recipe.concept import Concept


@dataclass(frozen=True)
class ProjectOut(Pass):
    """W' = W (I - D D+), where the columns of D tell the concept's names from its anchor: W' maps both to the same."""

    name = "project-out"
    version = "1"
    paper = ""
    summary = "an example: cross-attention made blind to what tells a concept from its anchor"

    strength: float = 1.0

    def sites(self, model: Model) -> tuple[Site, ...]:
        return model.select("cross", "kv")

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        tokens = model.encode([*concept.phrases, concept.anchor])
        ends = tokens.states[torch.arange(len(tokens.last)), tokens.last].double()  # the last token of each phrase
        away = (ends[:-1] - ends[-1]).T  # D, (d_in, phrases)
        back = self.strength * torch.linalg.pinv(away)
        deltas = {site: LowRank(-model.weight(site) @ away, back) for site in self.sites(model)}
        return Edit(deltas, self.name, concept.name, {"strength": self.strength}, model.digest)
