"""Drawing a token by one uniform number: the first, in order of id, whose cumulative probability exceeds it.

The number depends on the answer's seed and on how many tokens it has, and on nothing else: an answer that is
interrupted and resumed, or runs in other company, draws the same. No global generator is read or moved.

N rows, W width of the scores, C scores in view, K blocks of S columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.engine.choosing.peaks import BLOCK
from softprompt.engine.choosing.warping import Doubles, Filters, in_view, kept, running_sums

Ids = NDArray[np.int64]


def uniform(seed: int, step: int) -> float:
    """In [0, 1), 53 bits of Philox under this key and counter."""
    return float(int(np.random.Philox(key=seed, counter=step).random_raw()) >> 11) * 2.0**-53


def draw_from_all(scores_NW: Tensor, uniforms_N: Doubles) -> Ids:
    """An id of each row by the softmax of its scores; W is a whole number of blocks.

    In two steps, a block and a token in it: float32 sums of blocks, float64 over them and inside.
    """
    shares_NKS = torch.softmax(scores_NW, dim=-1).view(len(scores_NW), -1, BLOCK)
    blocks_NK = running_sums(shares_NKS.sum(-1).cpu().numpy())
    targets_N = uniforms_N * blocks_NK[:, -1]
    block_N = _first_above(blocks_NK, targets_N)
    inside_NS = running_sums(shares_NKS[torch.arange(len(block_N)), torch.from_numpy(block_N)].cpu().numpy())
    before_N = np.where(block_N > 0, np.take_along_axis(blocks_NK, np.maximum(block_N - 1, 0)[:, None], 1)[:, 0], 0)
    return block_N * BLOCK + _first_above(inside_NS, targets_N - before_N)


def draw_from_kept(scores_NW: Tensor, filters: Filters, masses_N: Doubles, uniforms_N: Doubles) -> Ids:
    """An id of each row among those that its filters keep; `masses_N` as `in_view` wants it."""
    view_NC, ids_NC = in_view(scores_NW, filters, masses_N)
    weights_NC = np.exp(view_NC - view_NC.max(axis=1, keepdims=True))
    sums_NC = running_sums(weights_NC * kept(view_NC, filters, masses_N))
    places_N = _first_above(sums_NC, uniforms_N * sums_NC[:, -1])
    drawn: Ids = np.take_along_axis(ids_NC, places_N[:, None], axis=1)[:, 0]
    return drawn


def _first_above(sums_NC: Doubles, targets_N: Doubles) -> Ids:
    """The first column whose sum exceeds the target; where rounding leaves none, the last that adds anything."""
    rows = zip(sums_NC, targets_N, strict=True)
    places = [min(sums.searchsorted(target, "right"), sums.searchsorted(sums[-1])) for sums, target in rows]
    return np.array(places, dtype=np.int64)
