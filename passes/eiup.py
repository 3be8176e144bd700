"""EIUP: cross-attention reads an erasure prompt in addition to the user's, and subtracts its output.

Chen et al.: "EIUP: A Training-Free Approach to Erase Non-Compliant Concepts Conditioned on Implicit Unsafe Prompts",
arXiv:2408.01014v1; its second version is "Growth Inhibitors for Suppressing Inappropriate Image Concepts". Nothing is
trained: the queries of the image attend to the erasure prompt, whether or not the user's prompt names the concept.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Pass
from erasec.errors import ErasecError
from erasec.model.edit import Edit
from erasec.model.memory import Memory
from erasec.options import options
from erasec.progress import note
from erasec.training.base import NEEDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@options
class Eiup(Pass):
    """A memory of the erasure prompt at every cross-attention. No weight changes.

    ``words`` is the erasure prompt; where it is empty, the names of the concept are, one after another. The output of
    attention to that prompt is added with the factor ``weight``, 0 or less, in the first ``until`` of the noise
    schedule, to the prompted half of a guided batch. ``tokens`` selects the tokens that contribute. With "words", as
    published, these are the tokens of the words. With "all" they are all tokens, and the output for the empty prompt is
    subtracted, so that only the difference between the two prompts acts. ("all" is not in the paper: in CLIP, end and
    padding tokens hold much of the meaning of a prompt.) In the paper a network chooses the weight for each prompt and
    word. It was never released, so that the weight is fixed.
    """

    words: str = ""
    weight: Annotated[float, Field(le=0)] = -1.0
    until: Annotated[float, Field(gt=0, le=1)] = 0.8
    tokens: Literal["all", "words"] = "words"

    name: ClassVar[str] = "eiup"
    paper: ClassVar[str] = "arXiv:2408.01014"
    summary: ClassVar[str] = "no training: cross-attention also reads an erasure prompt, and subtracts its output"
    when: ClassVar[str] = "where weights must not change, and some damage to other images is acceptable"
    limits: ClassVar[str] = (
        "prompts that do not name the concept still draw much of it; without the memory the whole concept is back"
    )
    extras: ClassVar[frozenset[str]] = frozenset({"memory"})
    prompt_options: ClassVar[frozenset[str]] = frozenset({"words"})

    def sites(self, model: Model) -> tuple[Site, ...]:
        """No sites: no weight changes. Raises ErasecError for a family without cross-attention."""
        check_family(model)
        return ()

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        check_family(model)
        sites = {site.key: site for site in model.select("cross", "kv")}
        phrases = (self.words,) if self.words else fitting_phrases(model, concept.phrases)
        if not self.words and len(phrases) < len(concept.phrases):
            note(
                f"eiup: the erasure prompt holds the first {len(phrases)} of {len(concept.phrases)} phrases of "
                f"{concept.name}, up to {phrases[-1]!r}: there is no room for more. The option words chooses others."
            )
        prompts = [(text_rows(model, " ".join(phrases), self.tokens), self.weight)]
        if self.tokens == "all":
            empty = model.encode([""]).states[0].double()
            prompts.append(((empty, empty), -self.weight))
        memories = []
        for key, site in sites.items():
            if site.proj == "k":
                attention = key.removesuffix(".to_k.weight")
                to_k, to_v = model.weight(site), model.weight(sites[f"{attention}.to_v.weight"])
                for (k_rows, v_rows), weight in prompts:
                    keys, values = (k_rows @ to_k.T).float(), (v_rows @ to_v.T).float()
                    memories.append(Memory(attention, keys, values, "side", weight, self.until, guided=True))
        stats = {
            "memories": float(len(memories)),
            "rows": float(len(prompts[0][0][0])),
            "phrases": float(len(phrases)),
        }
        return Edit({}, self.name, (concept.name,), model.digest, asdict(self), stats=stats, memories=tuple(memories))


def check_family(model: Model) -> None:
    """Raise ErasecError for a family without cross-attention."""
    has, reason = NEEDS["cross-attention"]
    if not has(model.family):
        raise ErasecError(
            f"eiup does not fit a model of the family {model.family.name}",
            why=reason.format(title=model.family.title),
            fix="choose a closed-form pass: erasec list passes",
        )


def fitting_phrases(model: Model, phrases: Sequence[str]) -> tuple[str, ...]:
    """As many of the phrases, from the first, as fit into one prompt; at least one."""
    room = model.encode([""]).states.shape[1] - 2
    ends = [int(model.last_tokens([" ".join(phrases[:count])])) for count in range(1, len(phrases) + 1)]
    return tuple(phrases[: max(1, sum(end < room for end in ends))])


def text_rows(model: Model, words: str, tokens: str) -> tuple[Tensor, Tensor]:
    """Text states (t, d) of the erasure prompt for keys, and those for values, float64.

    With ``tokens`` "all" both are all states of the prompt. With "words" the values of other tokens than the words' are
    zero: these take part in the softmax, and add nothing to its output. Raises ErasecError where the words have no
    token.
    """

    import torch

    encoded = model.encode([words])
    last = int(encoded.last[0])
    if last < 1:
        raise ErasecError(f"eiup: the erasure prompt {words!r} has no token", fix="give words that name the concept")
    states = encoded.states[0].double()
    if tokens == "all":
        return states, states
    values = torch.zeros_like(states)
    values[1 : last + 1] = states[1 : last + 1]
    return states, values
