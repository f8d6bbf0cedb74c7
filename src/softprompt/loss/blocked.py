"""Negative log-likelihood over a large vocabulary, block by block of the output embeddings, and its gradient.

The gradient of a target's loss by its hidden state is the mean of the output embeddings under softmax(logits), less the
target's own: an attention of the hidden states over the vocabulary, with the output embeddings as keys and as values.
So it is computed as FlashAttention computes attention (2205.14135), with a running maximum and sum (Milakov and
Gimelshein, 1805.02867): each block of output embeddings is read once, gives logits and gradient while it is at hand,
and only [N, block] numbers exist. `softprompt.loss.chunked` is the plain way that it is tested against.

N targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.compute_share import yield_point
from softprompt.families import Head, PackedWeight

_MOST_TARGETS = 4_096  # at once
_BLOCK_NUMBERS = {"cpu": 1_500_000, "cuda": 64_000_000}  # logits at once: what fits the caches of a CPU
_SMALLEST_BLOCK, _LARGEST_BLOCK = 512, 8_192  # rows of the output embeddings


def blocked_nll(head: Head, hidden_ND: Tensor, ids_N: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each target's nats [N], and the gradient [N, D] of their weighted sum where weights are given.

    Sums are float32 (float64 for a float64 base).
    """
    nats, grads = [], []
    for first in range(0, max(len(ids_N), 1), _MOST_TARGETS):
        some = slice(first, first + _MOST_TARGETS)
        found = _Running(head, hidden_ND[some], ids_N[some], weights_N is not None)
        nats.append(found.nats())
        if weights_N is not None:
            grads.append(found.gradient(weights_N[some]))
    return torch.cat(nats), torch.cat(grads) if grads else None


@dataclass
class _Running:
    """Softmax over the blocks seen so far."""

    head: Head
    hidden: Tensor
    ids: Tensor
    wants_gradient: bool

    def __post_init__(self) -> None:
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        self.maximum = self.hidden.new_full((len(self.ids),), -torch.inf, dtype=wide)
        self.total = torch.zeros_like(self.maximum)
        self.target = torch.zeros_like(self.maximum)  # the target's logit
        self.target_slope = torch.ones_like(self.maximum)
        self.mean = self.hidden.new_zeros(self.hidden.shape if self.wants_gradient else 0, dtype=wide)
        first = 0
        for block in self.head.products.row_blocks(self.weight, _block_size(self.hidden)):
            self._add(block, first)
            first += len(block.weight)

    @property
    def weight(self) -> Tensor:
        weight = self.head.weight
        assert weight is not None
        return weight

    def nats(self) -> Tensor:
        return self.maximum + self.total.log() - self.target

    def gradient(self, weights: Tensor) -> Tensor:
        own = self.weight[self.ids].to(self.mean.dtype) * self.target_slope[:, None]
        grad = (self.mean / self.total[:, None] - own) * (weights * self.head.scale)[:, None]
        return grad.to(self.hidden.dtype)

    def _add(self, block: PackedWeight, first: int) -> None:
        yield_point()
        logits = self.head.bend(block.times(self.hidden)).to(self.maximum.dtype)
        slopes = None if self.head.cap is None else 1 - (logits / self.head.cap).square()
        self._pick_targets(logits, slopes, first)
        maximum = torch.maximum(self.maximum, logits.amax(dim=1))
        shrink = torch.exp(self.maximum - maximum)
        shares = logits.sub_(maximum[:, None]).exp_()
        self.maximum, self.total = maximum, self.total * shrink + shares.sum(dim=1)
        if self.wants_gradient:
            shares = shares if slopes is None else shares * slopes
            self.mean *= shrink[:, None]
            self.mean += block.back(shares.to(self.hidden.dtype))

    def _pick_targets(self, logits: Tensor, slopes: Tensor | None, first: int) -> None:
        is_here = (self.ids >= first) & (self.ids < first + logits.shape[1])
        column = (self.ids - first).clamp(0, logits.shape[1] - 1)[:, None]
        self.target = torch.where(is_here, logits.gather(1, column)[:, 0], self.target)
        if slopes is not None:
            self.target_slope = torch.where(is_here, slopes.gather(1, column)[:, 0], self.target_slope)


def _block_size(hidden: Tensor) -> int:
    numbers = _BLOCK_NUMBERS.get(hidden.device.type, _BLOCK_NUMBERS["cpu"])
    fitting = numbers // max(len(hidden), 1)
    return min(max(fitting, _SMALLEST_BLOCK), _LARGEST_BLOCK)
