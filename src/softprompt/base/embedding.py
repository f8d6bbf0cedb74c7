"""The scale of the input embeddings, which starts and learning rates are measured in."""

from __future__ import annotations

import math

import torch
from torch import nn

_ROWS_PER_CHUNK = 16_384


def embedding_rms(embedding: nn.Embedding, device: torch.device) -> float:
    """Root mean square over all entries of the table [V, H], in float64, after the module's own scaling.

    `device` is where it takes its ids. Gemma-3's embedding module multiplies what it looks up; the table's raw weights
    would be off by that factor.
    """
    total = 0.0
    with torch.no_grad():
        for first in range(0, embedding.num_embeddings, _ROWS_PER_CHUNK):
            last = min(first + _ROWS_PER_CHUNK, embedding.num_embeddings)
            ids = torch.arange(first, last, device=device)
            total += float(embedding(ids).double().square().sum())
    return math.sqrt(total / (embedding.num_embeddings * embedding.embedding_dim))
