"""What a soft prompt looks like from the vocabulary: nearest tokens and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softprompt.base import Base
from softprompt.prompt.direction import cosines
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.prompt.vocabulary import vocabulary_chunks


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
