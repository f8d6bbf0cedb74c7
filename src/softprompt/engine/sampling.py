"""Choosing the next token of every row, with transformers' own logits processors.

The repetition penalty sees each row's real ids (its text's, BOS included, and its answer's), never virtual tokens or
pads. Every row draws from a generator of its own, so its answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.base import Base
from softprompt.config import SamplingConfig


class Sampler:
    """The settings of one batch and a random generator per row."""

    def __init__(self, base: Base, config: SamplingConfig, num_rows: int) -> None:
        self.config = config
        self._stop_ids = [token for token in base.stop_ids if token < base.vocab_size]
        self._penalty = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
        self._warpers = _warpers(config)
        self._generators = [torch.Generator().manual_seed(config.seed) for _ in range(num_rows)]
        self._num_chosen = 0

    def choose(self, logits_BV: Tensor, rows: Sequence[int], ids: Sequence[list[int]]) -> Tensor:
        """Next ids [B]; `rows` are the rows' numbers in the batch at its start, `ids` all of their real ids so far."""
        scores_BV = self._penalised(logits_BV, ids)
        if self._num_chosen < self.config.min_new_tokens:
            scores_BV = scores_BV.clone()
            scores_BV[:, self._stop_ids] = -torch.inf
        self._num_chosen += 1
        if self.config.temperature == 0:
            return scores_BV.argmax(dim=-1)
        return self._sampled(scores_BV, rows)

    def _penalised(self, logits_BV: Tensor, ids: Sequence[list[int]]) -> Tensor:
        if self.config.repetition_penalty == 1.0:
            return logits_BV
        return torch.cat([self._penalty(_row_of(own, logits), logits) for own, logits in _rows(ids, logits_BV)])

    def _sampled(self, scores_BV: Tensor, rows: Sequence[int]) -> Tensor:
        nothing = torch.LongTensor(len(rows), 0)  # these warpers do not look at ids
        probabilities = torch.softmax(self._warpers(nothing, scores_BV), dim=-1).cpu()
        drawn = [
            torch.multinomial(row_probabilities, 1, generator=self._generators[row])
            for row, row_probabilities in zip(rows, probabilities, strict=True)
        ]
        return torch.cat(drawn).to(scores_BV.device)


def _rows(ids: Sequence[list[int]], logits_BV: Tensor) -> list[tuple[list[int], Tensor]]:
    return [(own, logits[None]) for own, logits in zip(ids, logits_BV, strict=True)]


def _row_of(ids: list[int], logits: Tensor) -> Tensor:
    return torch.tensor([ids], dtype=torch.long, device=logits.device)


def _warpers(config: SamplingConfig) -> LogitsProcessorList:
    """The order of transformers' generate: temperature, top-k, top-p, min-p."""
    warpers = LogitsProcessorList()
    if config.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers
