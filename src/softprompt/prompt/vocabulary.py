"""The embeddings of the tokens that a base's tokenizer knows; rows that only pad the table are left out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softprompt.base import Base

_TOKENS_PER_CHUNK = 16_384


def vocabulary_size(base: Base) -> int:
    """V, the tokens that have both a text and an embedding."""
    return min(len(base.tokenizer), base.vocab_size)


def vocabulary_chunks(base: Base) -> Iterator[Tensor]:
    """Input embeddings of tokens 0 to V - 1, in chunks of at most 16,384 tokens [., H], float32 on the CPU."""
    size = vocabulary_size(base)
    for first in range(0, size, _TOKENS_PER_CHUNK):
        yield base.embed(torch.arange(first, min(first + _TOKENS_PER_CHUNK, size))).float().cpu()


def mean_embedding(base: Base) -> Tensor:
    """The mean input embedding [H] over the vocabulary, float64 on the CPU."""
    total_H = torch.zeros(base.hidden_size, dtype=torch.float64)
    for chunk_VH in vocabulary_chunks(base):
        total_H += chunk_VH.double().sum(dim=0)
    return total_H / vocabulary_size(base)
