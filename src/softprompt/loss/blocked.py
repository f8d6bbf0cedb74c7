"""Negative log-likelihood over a large vocabulary, block by block of the output embeddings, and its gradient.

The gradient of a target's loss by its hidden state is the mean of the output embeddings under softmax(logits), less the
target's own: an attention of the hidden states over the vocabulary, with the output embeddings as keys and as values.
So it is computed as FlashAttention computes attention (2205.14135), with a running maximum and sum (Milakov and
Gimelshein, 1805.02867): each block of output embeddings is read once, gives logits and gradient while it is at hand,
and only [N, block] numbers exist. `softprompt.loss.chunked` is the plain way that it is tested against.

N targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.compute_share import yield_point
from softprompt.families import Head

MOST_TARGETS = 4_096  # at once
BLOCK_NUMBERS = {"cpu": 1_500_000, "cuda": 64_000_000}  # logits at once: what fits the caches of a CPU
SMALLEST_BLOCK, LARGEST_BLOCK = 512, 8_192  # rows of the output embeddings


def blocked_nll(head: Head, hidden_ND: Tensor, ids_N: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each target's nats [N], and the gradient [N, D] of their weighted sum where weights are given.

    Sums are float32 (float64 for a float64 base).
    """
    nats, grads = [], []
    for first in range(0, max(len(ids_N), 1), MOST_TARGETS):
        some = slice(first, first + MOST_TARGETS)
        weights = None if weights_N is None else weights_N[some]
        found, grad = _some_targets(head, hidden_ND[some], ids_N[some], weights)
        nats.append(found)
        if grad is not None:
            grads.append(grad)
    return torch.cat(nats), torch.cat(grads) if grads else None


def _some_targets(head: Head, hidden: Tensor, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same for few enough targets; softmax and its mean run over the blocks."""
    weight = head.weight
    assert weight is not None
    wide = torch.promote_types(hidden.dtype, torch.float32)
    maximum = hidden.new_full((len(ids),), -torch.inf, dtype=wide)
    total, target_logit, target_slope = torch.zeros_like(maximum), torch.zeros_like(maximum), torch.ones_like(maximum)
    mean = hidden.new_zeros(hidden.shape if weights is not None else 0, dtype=wide)
    first = 0
    for block in head.kernels.row_blocks(weight, block_size(hidden)):
        yield_point()
        logits = head.bend(block.times(hidden)).to(wide)
        slopes = None if head.cap is None else 1 - (logits / head.cap).square()
        target_logit = _at_targets(logits, ids - first, target_logit)
        if slopes is not None:
            target_slope = _at_targets(slopes, ids - first, target_slope)
        last_maximum, maximum = maximum, torch.maximum(maximum, logits.amax(dim=1))
        shrink = torch.exp(last_maximum - maximum)
        exps = logits.sub_(maximum[:, None]).exp_()
        total = total * shrink + exps.sum(dim=1)
        if weights is not None:
            mean *= shrink[:, None]
            mean += block.back((exps if slopes is None else exps * slopes).to(hidden.dtype))
        first += len(block.weight)
        del logits, slopes, exps  # before the next block's are made
    nats = maximum + total.log() - target_logit
    if weights is None:
        return nats, None
    own = weight[ids].to(wide) * target_slope[:, None]
    grad = (mean / total[:, None] - own) * (weights * head.scale)[:, None]
    return nats, grad.to(hidden.dtype)


def _at_targets(block: Tensor, column_N: Tensor, others: Tensor) -> Tensor:
    """The block's number [N] in each target's column; those of `others` for targets in other blocks."""
    is_here = (column_N >= 0) & (column_N < block.shape[1])
    column = column_N.clamp(0, block.shape[1] - 1)[:, None]
    return torch.where(is_here, block.gather(1, column)[:, 0], others)


def block_size(hidden: Tensor) -> int:
    numbers = BLOCK_NUMBERS.get(hidden.device.type, BLOCK_NUMBERS["cpu"])
    fitting = numbers // max(len(hidden), 1)
    return min(max(fitting, SMALLEST_BLOCK), LARGEST_BLOCK)
