"""The largest of each row, first id first where several are equal.

Through the maxima of blocks, because a maximum alone is many times faster than one with its place (bfloat16 above
all). NaN is the largest of its row. B and N rows, V vocabulary, K blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 512  # columns of one block


def first_peak(scores_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value [B] of each row and its first id [B]; an arbitrary id where the value is NaN."""
    width = scores_BV.shape[1]
    peaks_BK = block_peaks(scores_BV)
    values = peaks_BK.amax(-1, keepdim=True)
    start = _first(peaks_BK == values) * BLOCK
    columns = (start + torch.arange(BLOCK, device=scores_BV.device)).clamp_(max=width - 1)
    place = _first(scores_BV.gather(1, columns) == values)
    return values[:, 0], columns.gather(1, place)[:, 0]


def block_peaks(scores_BV: Tensor) -> Tensor:
    """The largest of each block [B, K]; the last block may be short."""
    width = scores_BV.shape[1]
    whole = width - width % BLOCK
    peaks_BK = scores_BV[:, :whole].view(len(scores_BV), whole // BLOCK, BLOCK).amax(-1)
    return peaks_BK if whole == width else torch.cat([peaks_BK, scores_BV[:, whole:].amax(-1, keepdim=True)], dim=1)


def best_first(log_probs_NV: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest (id, nats) of each row, as many as its count, best first and the lower id first where equal."""
    width = min(2 * max(counts) + 16, log_probs_NV.shape[1])
    if max(counts) == 0:
        return [()] * len(counts)
    values_NC, ids_NC = (part.cpu().numpy() for part in log_probs_NV.topk(width, dim=-1))
    return [
        _in_order(log_probs_NV[row], values_NC[row], ids_NC[row], min(count, width)) for row, count in enumerate(counts)
    ]


def _in_order(
    log_probs_V: Tensor, values_C: NDArray[np.float32], ids_C: NDArray[np.int64], count: int
) -> tuple[tuple[int, float], ...]:
    if count and values_C[-1] == values_C[count - 1]:  # there may be more of that value than were looked at
        ids_C = (log_probs_V >= float(values_C[-1])).nonzero()[:, 0].cpu().numpy()
        values_C = log_probs_V.cpu().numpy()[ids_C]
    order = np.lexsort((ids_C, -values_C))[:count]
    return tuple(zip(ids_C[order].tolist(), values_C[order].tolist(), strict=True))


def _first(flags_BN: Tensor) -> Tensor:
    """[B, 1]: the first true column, 0 where there is none."""
    return flags_BN.to(torch.uint8).argmax(-1, keepdim=True)
