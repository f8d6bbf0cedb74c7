"""How alike two soft prompts are, whatever the order of their virtual tokens.

Each token is matched with the most similar one of the other prompt (largest cosine), as BERTScore does with the tokens
of two texts (Zhang et al. 2020, arXiv 1904.09675); the two directions are averaged with equal weight.

P and Q prompt lengths, H embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from softprompt.errors import PromptError
from softprompt.prompt.direction import cosines
from softprompt.prompt.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class SimilarPair:
    """Two prompts of one width, by name."""

    one: str
    other: str
    similarity: float  # between -1 and 1
    is_identical: bool  # the same content hash


def similarity(one: SoftPrompt, other: SoftPrompt, centre_H: Tensor | None = None) -> float:
    """Mean over the tokens of each of its largest cosine to a token of the other, averaged both ways; in [-1, 1].

    Symmetric; 1 for two prompts with the same vectors, whatever their order or number. `centre_H` (the mean embedding
    of the base's vocabulary) is subtracted from all vectors first: embeddings share a direction that says nothing.
    Computed in float64. Raises PromptError for prompts or a centre of different widths.
    """
    _check_widths(one, other, centre_H)
    if torch.equal(one.tensor, other.tensor):
        return 1.0
    cosines_PQ = cosines(_centred(one, centre_H), _centred(other, centre_H))
    both_ways = (cosines_PQ.amax(dim=1).mean() + cosines_PQ.amax(dim=0).mean()) / 2
    return float(both_ways.clamp(-1, 1))


def similar_pairs(prompts: Mapping[str, SoftPrompt], centre_H: Tensor | None = None) -> list[SimilarPair]:
    """Every two prompts of the same width, most similar first. Raises PromptError as `similarity` does."""
    hashes = {name: prompt.content_hash for name, prompt in prompts.items()}
    pairs = [
        SimilarPair(one, other, similarity(prompts[one], prompts[other], centre_H), hashes[one] == hashes[other])
        for one, other in combinations(prompts, 2)
        if prompts[one].hidden_size == prompts[other].hidden_size
    ]
    return sorted(pairs, key=lambda pair: -pair.similarity)


def _centred(prompt: SoftPrompt, centre_H: Tensor | None) -> Tensor:
    vectors = prompt.tensor.double()
    return vectors if centre_H is None else vectors - centre_H.detach().cpu().double()


def _check_widths(one: SoftPrompt, other: SoftPrompt, centre_H: Tensor | None) -> None:
    if one.hidden_size != other.hidden_size:
        raise PromptError(
            f"similarity needs prompts of one width; these have {one.hidden_size} and {other.hidden_size} numbers "
            "per virtual token"
        )
    if centre_H is not None and centre_H.shape != (one.hidden_size,):
        raise PromptError(f"the centre has the shape {list(centre_H.shape)}; the prompts need [{one.hidden_size}]")
