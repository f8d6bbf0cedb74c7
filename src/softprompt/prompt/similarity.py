"""Prompts by cosine: how alike two of them are, and which tokens of a base's vocabulary lie nearest to each vector.

Two prompts are compared whatever the order of their virtual tokens: each token is matched with the most similar one of
the other prompt (largest cosine), as BERTScore does with the tokens of two texts (Zhang et al. 2020, arXiv 1904.09675);
the two directions are averaged with equal weight.

P and Q prompt lengths, H embedding width, V tokens of the vocabulary. A zero vector has no direction; its cosine to
anything is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.errors import PromptError
from softprompt.prompt.soft_prompt import SoftPrompt

_TOKENS_PER_CHUNK = 16_384


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


@dataclass(frozen=True)
class NearestTokens:
    """One virtual token: its Euclidean norm and the tokens whose embeddings point most alike."""

    norm: float
    tokens: tuple[tuple[str, float], ...]  # (token's text, cosine similarity), most similar first


def nearest_tokens(prompt: SoftPrompt, base: Base, count: int = 5) -> list[NearestTokens]:
    """For each of the P virtual tokens, the `count` nearest of the V vocabulary tokens by cosine similarity."""
    similarity_PV = torch.cat([cosines(prompt.tensor, chunk) for chunk in vocabulary_chunks(base)], dim=1)
    best = similarity_PV.topk(min(count, similarity_PV.shape[1]), dim=1)
    norms = prompt.tensor.norm(dim=1).tolist()
    return [
        NearestTokens(norm, tuple((_token_text(base, i), s) for i, s in zip(ids, values, strict=True)))
        for norm, ids, values in zip(norms, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _token_text(base: Base, token: int) -> str:
    return str(base.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def mean_embedding(base: Base) -> Tensor:
    """The mean input embedding [H] over the vocabulary, float64 on the CPU."""
    total_H = torch.zeros(base.hidden_size, dtype=torch.float64)
    for chunk_VH in vocabulary_chunks(base):
        total_H += chunk_VH.double().sum(dim=0)
    return total_H / vocabulary_size(base)


def vocabulary_size(base: Base) -> int:
    """V, the tokens that have both a text and an embedding."""
    return min(len(base.tokenizer), base.vocab_size)


def vocabulary_chunks(base: Base) -> Iterator[Tensor]:
    """Input embeddings of tokens 0 to V - 1, in chunks of at most 16,384 tokens [., H], float32 on the CPU."""
    size = vocabulary_size(base)
    for first in range(0, size, _TOKENS_PER_CHUNK):
        yield base.embed(torch.arange(first, min(first + _TOKENS_PER_CHUNK, size))).float().cpu()


def unit_vectors(vectors_NH: Tensor) -> Tensor:
    """Each vector [H] of [N, H] scaled to norm 1, in the same dtype; zero vectors stay zero."""
    largest_N1 = vectors_NH.abs().amax(dim=1, keepdim=True)
    scaled_NH = vectors_NH / largest_N1.where(largest_N1 > 0, 1)  # before squaring, which would overflow or vanish
    norm_N1 = scaled_NH.norm(dim=1, keepdim=True)
    unit_NH: Tensor = scaled_NH / norm_N1.where(norm_N1 > 0, 1)
    return unit_NH


def cosines(one_AH: Tensor, other_BH: Tensor) -> Tensor:
    """Cosine of every vector of one to every vector of the other, [A, B]."""
    return unit_vectors(one_AH) @ unit_vectors(other_BH).T
