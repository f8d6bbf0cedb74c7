"""Top-k, top-p and min-p: which tokens a row may be drawn from, as transformers' warpers keep them, in their order.

Only the few candidates are sorted: the scores above a floor below which no token can be kept. Equal to
transformers, except that tokens whose float32 sums lie within a millionth of top-p's bound may fall on either side.
N rows, W width of the scores (over the temperature already), C candidates in order of id, padded with -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.config import SamplingConfig

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Counts = NDArray[np.int64]

BLOCK = 512  # columns that are summed or compared first by themselves
_SPAN = 128  # columns of which only the best score is compared
_SLACK = 1e-3  # how far below the computed floor the one in use lies
_ROUNDING = 2e-7  # probability mass outside the candidates that float32 rounding could explain
_OFF = np.iinfo(np.int64).max


class Filters(NamedTuple):
    """The settings of N rows."""

    top_k: Counts  # a huge number where it is off
    top_p: Doubles
    min_p: Floats


def has_top_k(sampling: SamplingConfig, vocab_size: int) -> bool:
    """Whether top-k removes any token."""
    return 0 < sampling.top_k < vocab_size


def new_filters(samplings: Sequence[SamplingConfig], vocab_size: int) -> Filters:
    return Filters(
        np.array([s.top_k if has_top_k(s, vocab_size) else _OFF for s in samplings], dtype=np.int64),
        np.array([s.top_p for s in samplings], dtype=np.float64),
        np.array([s.min_p for s in samplings], dtype=np.float32),
    )


def exp_sums(scores_NW: Tensor) -> Doubles:
    """The sum of exp(score - best score) of each row; W is a whole number of blocks.

    By sums of blocks, because torch's softmax is some millionths off the sum of what it gives out.
    """
    shares_NW = torch.softmax(scores_NW, dim=-1)
    sums_NK = shares_NW.view(len(scores_NW), -1, BLOCK).sum(-1)
    sums_N: Doubles = running_sums(sums_NK.cpu().numpy())[:, -1] / shares_NW.amax(-1).cpu().numpy()
    return sums_N


def candidates(scores_NW: Tensor, filters: Filters, exp_sums_N: Doubles) -> tuple[Floats, Counts]:
    """The scores that may be kept [N, C], and their ids. `exp_sums_N` count for rows that have top-p without top-k."""
    floors_N1 = torch.from_numpy(_candidate_floor(scores_NW, filters, exp_sums_N)).to(scores_NW.device)[:, None]
    indices = _true_indices(scores_NW >= floors_N1)
    starts_N = np.searchsorted(indices, np.arange(len(scores_NW) + 1) * scores_NW.shape[1])
    counts_N = np.diff(starts_N)
    is_there_NC = np.arange(counts_N.max()) < counts_N[:, None]
    candidates_NC = np.full(is_there_NC.shape, -np.inf, dtype=np.float32)
    candidates_NC[is_there_NC] = scores_NW.view(-1)[torch.from_numpy(indices).to(scores_NW.device)].cpu().numpy()
    ids_NC = np.zeros(is_there_NC.shape, dtype=np.int64)
    ids_NC[is_there_NC] = indices - np.repeat(np.arange(len(counts_N)) * scores_NW.shape[1], counts_N)
    return candidates_NC, ids_NC


def keep_mask(candidates_NC: Floats, filters: Filters, exp_sums_N: Doubles) -> NDArray[np.bool_]:
    """Which of the candidates are kept."""
    rising_NC = np.sort(candidates_NC, axis=1)
    width = rising_NC.shape[1]
    firsts_N = np.zeros(len(rising_NC), dtype=np.int64)  # the lowest that is kept
    has_k = filters.top_k < width
    if has_k.any():
        kth_N = _column(rising_NC, np.where(has_k, width - filters.top_k, 0))
        firsts_N = _first_columns(rising_NC, kth_N)
    if (filters.top_p < 1).any():
        firsts_N = np.maximum(firsts_N, _firsts_of_top_p(rising_NC, firsts_N, filters, exp_sums_N))
    if filters.min_p.any():
        firsts_N = np.maximum(firsts_N, _first_columns(_over_best(rising_NC), filters.min_p))
    return _the_best(candidates_NC, _column(rising_NC, firsts_N), width - firsts_N)


def running_sums(weights_NC: Floats) -> Doubles:
    """In float64, from the left; torch is several times faster at it than numpy."""
    sums_NC: Doubles = torch.from_numpy(weights_NC).cumsum(-1, dtype=torch.float64).numpy()
    return sums_NC


def _true_indices(flags_NW: Tensor) -> Counts:
    """Where the flags are set, counted through all rows; numpy is several times faster at it than torch."""
    if flags_NW.device.type == "cpu":
        return np.flatnonzero(flags_NW.numpy())
    indices: Counts = flags_NW.view(-1).nonzero()[:, 0].cpu().numpy()
    return indices


def _candidate_floor(scores_NW: Tensor, filters: Filters, exp_sums_N: Doubles) -> Floats:
    """A score of each row, as high as is cheap to find, below which nothing can be kept."""
    tops_NK = np.sort(scores_NW.view(len(scores_NW), -1, _SPAN).amax(-1).cpu().numpy(), axis=1)[:, ::-1]
    with np.errstate(divide="ignore"):
        floors_N = _lowered(tops_NK[:, 0].astype(np.float64) + np.log(filters.min_p.astype(np.float64)))
    has_k = filters.top_k != _OFF
    if (filters.top_p < 1).any():
        of_top_p_N = np.maximum(floors_N, _top_p_floor(tops_NK, filters.top_p, exp_sums_N, scores_NW.shape[1]))
        floors_N = np.where(filters.top_p < 1, of_top_p_N, floors_N)
    if has_k.any():
        floors_N = np.where(has_k, _top_k_floor(scores_NW, tops_NK, filters.top_k), floors_N)
    finite_N: Floats = np.maximum(floors_N, np.finfo(np.float32).min).astype(np.float32)
    return finite_N


def _top_p_floor(tops_NK: Floats, top_p: Doubles, exp_sums_N: Doubles, width: int) -> Doubles:
    """The best scores of blocks down to where they alone sum to top_p; else what no number of tokens could."""
    sums_NK = running_sums(np.exp(tops_NK - tops_NK[:, :1]))
    is_enough_NK = sums_NK >= ((top_p + _ROUNDING) * exp_sums_N)[:, None]
    of_blocks_N = _column(tops_NK, is_enough_NK.argmax(axis=1))
    with np.errstate(divide="ignore"):
        too_small_N = _lowered(tops_NK[:, 0].astype(np.float64) + np.log((1 - top_p) * exp_sums_N / width))
    floors_N: Doubles = np.where(is_enough_NK[:, -1], of_blocks_N, too_small_N)
    return floors_N


def _top_k_floor(scores_NW: Tensor, tops_NK: Floats, top_k: Counts) -> Floats:
    """A score that at least k of the row reach: the k-th of the blocks' best, or where they are fewer the k-th best."""
    floors_N = _column(tops_NK, np.minimum(top_k, tops_NK.shape[1]) - 1)
    for row in np.flatnonzero((top_k > tops_NK.shape[1]) & (top_k != _OFF)).tolist():
        place = scores_NW.shape[1] - int(top_k[row])
        floors_N[row] = np.partition(scores_NW[row].cpu().numpy(), place)[place]
    return floors_N


def _lowered(floors_N: Doubles) -> Doubles:
    lowered_N: Doubles = floors_N - _SLACK * (1 + np.abs(floors_N))
    return lowered_N


def _firsts_of_top_p(rising_NC: Floats, firsts_N: Counts, filters: Filters, exp_sums_N: Doubles) -> Counts:
    """From which column on top-p keeps: from the lowest on it removes a mass of 1 - top_p."""
    width = rising_NC.shape[1]
    weights_NC = _over_best(rising_NC)
    if firsts_N.any():
        weights_NC[np.arange(width) < firsts_N[:, None]] = 0
    seen_N = running_sums(weights_NC)[:, -1]
    is_all = (filters.top_k != _OFF) | (exp_sums_N - seen_N < _ROUNDING * exp_sums_N)
    total_N = np.where(is_all, seen_N, exp_sums_N)
    up_to_NC = running_sums(weights_NC / total_N.astype(np.float32)[:, None])
    bounds_N = (1 - filters.top_p).astype(np.float32)
    rounded_N = (bounds_N.astype(np.float64) + np.nextafter(bounds_N, np.float32(2))) / 2  # float32 sums are compared
    firsts_N = _first_columns(up_to_NC, np.nextafter(rounded_N - (1 - seen_N / total_N), 2))
    return np.where(filters.top_p < 1, np.minimum(firsts_N, width - 1), 0)


def _over_best(rising_NC: Floats) -> Floats:
    """Probability relative to the likeliest."""
    weights_NC: Floats = np.exp(rising_NC - rising_NC[:, -1:])
    return weights_NC


def _first_columns(rising_NC: NDArray[np.floating], least_N: NDArray[np.floating]) -> Counts:
    """The first column of each row that reaches its least."""
    pairs = zip(rising_NC, least_N, strict=True)
    return np.array([row.searchsorted(least) for row, least in pairs], dtype=np.int64)


def _the_best(candidates_NC: Floats, lowest_N: Floats, num_N: Counts) -> NDArray[np.bool_]:
    """The `num_N` best, the lower id first where equal (in transformers that is left to the sort)."""
    stays_NC: NDArray[np.bool_] = candidates_NC >= lowest_N[:, None]
    too_many_N = stays_NC.sum(axis=1) - num_N
    for row in np.flatnonzero(too_many_N):
        stays_NC[row, np.flatnonzero(candidates_NC[row] == lowest_N[row])[-too_many_N[row] :]] = False
    return stays_NC


def _column(values_NC: Floats, columns_N: Counts) -> Floats:
    values_N: Floats = np.take_along_axis(values_NC, columns_N[:, None], axis=1)[:, 0]
    return values_N
