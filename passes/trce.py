"""TRCE, stage 1: the meaning of a malicious prompt is moved where it gathers, at the end token.

Chen, Guo, Wang et al.: "TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models", ICCV 2025,
arXiv:2503.07389.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from erasec.rows import ClosedForm, erased

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.concept import Concept
    from erasec.model import Model


@dataclass(frozen=True)
class Remap(ClosedForm):
    """The first end token of every phrase in every template becomes that of its counterpart in the same template. (The
    reference counts words to find it; here it is the token's true place.) All states of the kept prompts stay."""

    name: ClassVar[str] = "trce.remap"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = "stage 1 of TRCE: closed-form remap of the end token's keys and values"

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased(model, concept, "eot", stream)
