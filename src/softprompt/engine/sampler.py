"""The next token of B rows, each under settings of its own.

In this order on float32 logits: the base's sequence biases, bias, repetition, presence and frequency penalties, no end
before the minimum, the base's rules on tokens, the guide; then the likeliest at temperature 0, else temperature, top-k,
top-p, min-p and a draw. Rows are grouped by what they need, and every reduction stays inside its row, so an answer does
not depend on its neighbours.

B rows, N rows of one group, V vocabulary, W width of the scores: a whole number of blocks, larger than V.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.engine.guided_decoding import Guides
from softprompt.engine.logits_processors import (
    ChoosingRow,
    RowRules,
    Touched,
    add_sequence_biases,
    ending_ids,
    forbid,
    penalise,
)
from softprompt.engine.top_k_top_p import (
    BLOCK,
    Doubles,
    Filters,
    filters_of,
    has_top_k,
    in_view,
    kept,
    masses,
    running_sums,
)
from softprompt.errors import ConfigError

Way = Literal["greedy", "all", "filtered", "nucleus"]

_SLAB = {"cpu": 2**20}  # scores that are worked on at a time: what stays in a processor's cache
_LARGEST_SLAB = 2**24


@dataclass(frozen=True)
class Chosen:
    """One row's next token; log-probabilities are nats under the raw distribution, where they were asked for."""

    id: int
    log_prob: float | None = None
    alternatives: Alternatives = ()  # (id, nats) of the likeliest, best first


class Chooser:
    """Chooses for the rows of one base; it keeps no state of theirs."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._guides = Guides(base)

    def new_row(
        self, sampling: SamplingConfig, text_ids: Sequence[int], choice_index: int = 0, salt: str | None = None
    ) -> ChoosingRow:
        """The state of one answer that has no token yet. Its guide is compiled once for all answers with that salt.

        Raises ConfigError for a bias on an id that the base does not have or a guide that cannot be followed, and
        MissingDependencyError for a guide without llguidance.
        """
        for token, _ in sampling.logit_bias:
            if not 0 <= token < self._base.vocab_size:
                raise ConfigError(f"logit_bias names token {token}; base {self._base.name!r} has 0 to "
                                  f"{self._base.vocab_size - 1}")  # fmt: skip
        ending, rules = ending_ids(self._base, sampling), self._base.rules
        return ChoosingRow(
            sampling=sampling,
            text_ids=tuple(text_ids),
            seed=sampling.seed + choice_index,
            touched=Touched(sampling, text_ids, ending, max(sampling.min_new_tokens, rules.min_new(len(text_ids)))),
            guide=self._guides.guide_of(sampling, ending, salt),
            rules=RowRules(rules, text_ids, sampling.max_new_tokens) if rules.has_token_rules else None,
        )

    def prepare(self, sampling: SamplingConfig, salt: str | None = None) -> None:
        """Compile the guide that rows with these settings need, ahead of `new_row` and in any thread.

        Raises what `new_row` raises for a guide.
        """
        self._guides.guide_of(sampling, (), salt)

    @torch.inference_mode()
    def choose(
        self, logits_BV: Tensor, rows: Sequence[ChoosingRow], num_log_probs: Sequence[int | None]
    ) -> list[Chosen | None]:
        """What each row takes next; the logits and the rows stay as they are.

        `num_log_probs` is how many alternatives a row wants reported beside its token's log-probability, None for no
        report. None comes back for a row from which nothing can be chosen: its logits are NaN or infinite, or its
        settings forbid every token.
        """
        logits_BV = logits_BV.float() if logits_BV.dtype is torch.float64 else logits_BV
        ids = _chosen_ids(logits_BV, rows)
        asked = [b for b, (token, num) in enumerate(zip(ids, num_log_probs, strict=True)) if None not in (token, num)]
        reports = dict(_reports(logits_BV, asked, ids, num_log_probs))
        return [None if token is None else Chosen(token, *reports.get(b, ())) for b, token in enumerate(ids)]


def _chosen_ids(logits_BV: Tensor, rows: Sequence[ChoosingRow]) -> list[int | None]:
    values, likeliest = first_peak(logits_BV)
    is_sound = torch.isfinite(values).tolist()
    ids: list[int | None] = [i if fine else None for i, fine in zip(likeliest.tolist(), is_sound, strict=True)]
    groups: dict[Way, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        if is_sound[position] and not row.is_plain:
            groups[_way(row.sampling, logits_BV.shape[1])].append(position)
    for way, members in groups.items():
        for slab in _slabs(members, logits_BV):
            found = _choose_alike(way, logits_BV, [rows[position] for position in slab], slab)
            for position, token in zip(slab, found, strict=True):
                ids[position] = token
    return ids


def _way(sampling: SamplingConfig, vocab_size: int) -> Way:
    if sampling.temperature == 0:
        return "greedy"
    has_k = has_top_k(sampling, vocab_size)
    if sampling.top_p < 1 and not has_k:
        return "nucleus"  # what it keeps depends on the mass of all
    return "filtered" if has_k or sampling.min_p else "all"


def _slabs(members: list[int], logits_BV: Tensor) -> Iterator[list[int]]:
    step = max(1, _SLAB.get(logits_BV.device.type, _LARGEST_SLAB) // logits_BV.shape[1])
    return (members[start : start + step] for start in range(0, len(members), step))


def _choose_alike(
    way: Way, logits_BV: Tensor, rows: Sequence[ChoosingRow], positions: Sequence[int]
) -> list[int | None]:
    """The ids of rows that need the same; None where every token is forbidden."""
    scores_NW = _scores(logits_BV, rows, positions)
    peaks, likeliest = first_peak(scores_NW)
    peaks_N, ids_N = peaks.cpu().numpy(), likeliest.cpu().numpy()
    if way != "greedy":
        temperatures_N = np.array([row.sampling.temperature for row in rows], dtype=np.float32)
        with np.errstate(all="ignore"):
            drawing = np.flatnonzero(np.isfinite(peaks_N / temperatures_N))  # the others' temperature is as good as 0
        if len(drawing):
            scores_NW = scores_NW if len(drawing) == len(rows) else scores_NW[drawing.tolist()]
            scores_NW.div_(torch.from_numpy(temperatures_N[drawing]).to(scores_NW.device)[:, None])
            ids_N[drawing] = _drawn(way, scores_NW, [rows[number] for number in drawing.tolist()], logits_BV.shape[1])
    return [int(i) if peak > -math.inf else None for i, peak in zip(ids_N, peaks_N, strict=True)]


def _scores(logits_BV: Tensor, rows: Sequence[ChoosingRow], positions: Sequence[int]) -> Tensor:
    """[N, W] in float32, all that comes before the temperature done; the columns behind the vocabulary are -inf."""
    vocab_size = logits_BV.shape[1]
    width = (vocab_size // BLOCK + 1) * BLOCK
    scores_NW = torch.empty(len(rows), width, device=logits_BV.device)
    scores_NW[:, :vocab_size] = logits_BV if len(rows) == len(logits_BV) else logits_BV[list(positions)]
    add_sequence_biases(scores_NW, rows)
    if any(row.is_penalised for row in rows):
        penalise(scores_NW, rows, vocab_size)
    forbid(scores_NW, rows)
    for number, row in enumerate(rows):
        if row.guide is not None:
            allowed = torch.from_numpy(row.guide.allowed(width)).to(scores_NW.device)
            scores_NW[number].masked_fill_(~allowed, -torch.inf)
    scores_NW[:, vocab_size:] = -torch.inf
    return scores_NW


def _drawn(way: Way, scores_NW: Tensor, rows: Sequence[ChoosingRow], vocab_size: int) -> Ids:
    uniforms_N: Doubles = np.array([uniform(row.seed, len(row.new_ids)) for row in rows])
    if way == "all":
        return draw_from_all(scores_NW, uniforms_N)
    masses_N = masses(scores_NW) if way == "nucleus" else np.ones(len(rows))
    return draw_from_kept(scores_NW, filters_of([row.sampling for row in rows], vocab_size), masses_N, uniforms_N)


def _reports(
    logits_BV: Tensor, asked: list[int], ids: Sequence[int | None], num_log_probs: Sequence[int | None]
) -> Iterator[tuple[int, tuple[float, Alternatives]]]:
    """(row, its token's log-probability and alternatives) of the rows that want them."""
    for slab in _slabs(asked, logits_BV):
        chosen = [token for token in (ids[position] for position in slab) if token is not None]
        yield from zip(slab, report(logits_BV[slab], chosen, [num_log_probs[position] or 0 for position in slab]),
                       strict=True)  # fmt: skip


# --

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


# --


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


# --

Alternatives = tuple[tuple[int, float], ...]


def report(logits_NV: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[tuple[float, Alternatives]]:
    """Each id's nats under its row of raw logits, in float32, and (id, nats) of so many likeliest, best first."""
    log_probs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen = torch.tensor(ids, device=logits_NV.device)
    values = log_probs_NV.gather(1, chosen[:, None])[:, 0].tolist()
    return list(zip(values, best_first(log_probs_NV, counts), strict=True))
