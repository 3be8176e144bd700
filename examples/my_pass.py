"""A pass of your own in one file: ``erasec build glyphs --erase star --pass examples/my_pass.py:ProjectOut``."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from erasec.base import Context, Pass
from erasec.family import Site
from erasec.model.edit import Edit, LowRank
from erasec.model.view import Model
from erasec.options import options
from erasec.recipe.concept import Concept


@options
class ProjectOut(Pass):
    """W' = W (I - D D+). The columns of D are the concept's names minus its anchor, so W' maps both to the same."""

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0

    name: ClassVar[str] = "project-out"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "an example: projects out of cross-attention what tells a concept from its anchor"

    def sites(self, model: Model) -> tuple[Site, ...]:
        return model.select("cross", "kv")

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        tokens = model.encode([*concept.phrases, concept.anchor])
        states = tokens.states[torch.arange(len(tokens.last)), tokens.last].double()  # the last token of each phrase
        difference = (states[:-1] - states[-1]).T  # D, (d_in, phrases)
        right = self.strength * torch.linalg.pinv(difference)
        deltas = {site: LowRank(-model.weight(site) @ difference, right) for site in self.sites(model)}
        return Edit(deltas, self.name, (concept.name,), model.digest, {"strength": self.strength})
