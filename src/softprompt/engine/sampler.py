"""Samples the next token of B rows, each under its own settings, and reports log-probabilities.

On float32 logits, in this order: the base's sequence biases, bias, repetition, presence and frequency penalties, no end
before the minimum, the base's rules on tokens, the guide; then the likeliest at temperature 0, else temperature, top-k,
top-p, min-p and a draw. Rows are grouped by sampling mode, and every reduction stays inside its row, so an answer does
not depend on its neighbours.

A draw takes the first token, in order of id, whose cumulative probability exceeds one uniform number. The number
depends only on the answer's seed and on how many tokens it has: an answer that is preempted and resumed, or runs in
another batch, draws the same. No global generator is read or moved.

B rows, N rows of one group, V vocabulary, W width of the scores (a whole number of
blocks, larger than V), C candidates, K blocks of S columns.
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
from softprompt.engine.guided_decoding import GuideCache
from softprompt.engine.logits_processors import (
    LogitEdits,
    SamplingState,
    TokenRules,
    add_sequence_biases,
    apply_penalties,
    ending_ids,
    forbid_tokens,
)
from softprompt.engine.top_k_top_p import (
    BLOCK,
    Doubles,
    Filters,
    candidates,
    exp_sums,
    has_top_k,
    keep_mask,
    new_filters,
    running_sums,
)

Alternatives = tuple[tuple[int, float], ...]
Ids = NDArray[np.int64]
SamplingMode = Literal["greedy", "all", "filtered", "nucleus"]

_SLAB = {"cpu": 2**20}  # scores processed at a time: as many as stay in a processor's cache
_LARGEST_SLAB = 2**24


@dataclass(frozen=True)
class SampledToken:
    """One row's next token; log-probabilities are nats under the raw distribution, where they are wanted."""

    id: int
    log_prob: float | None = None
    alternatives: Alternatives = ()  # (id, nats) of the likeliest, best first


class Sampler:
    """Samples for the rows of one base, and keeps no state of theirs."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._guides = GuideCache(base)

    def new_state(
        self, sampling: SamplingConfig, text_ids: Sequence[int], choice_index: int = 0, salt: str | None = None
    ) -> SamplingState:
        """The state of one answer that has no token yet. Its guide is compiled once for all answers with that salt.

        `request.check_request` has judged the settings. Raises ConfigError for a guide that cannot be followed, and
        MissingDependencyError for a guide without llguidance.
        """
        ending, rules = ending_ids(self._base, sampling), self._base.rules
        return SamplingState(
            sampling=sampling,
            seed=sampling.seed + choice_index,
            ending_ids=ending,
            edits=LogitEdits(sampling, text_ids, ending, max(sampling.min_new_tokens, rules.min_new(len(text_ids)))),
            guide=self._guides.new_guide(sampling, ending, salt),
            rules=TokenRules(rules, text_ids, sampling.max_new_tokens) if rules.has_token_rules else None,
        )

    def prepare(self, sampling: SamplingConfig, salt: str | None = None) -> None:
        """Compile the guide that these settings need, ahead of `new_state` and in any thread.

        Raises what `new_state` raises.
        """
        self._guides.new_guide(sampling, (), salt)

    @torch.inference_mode()
    def sample(
        self, logits_BV: Tensor, rows: Sequence[SamplingState], num_log_probs: Sequence[int | None]
    ) -> list[SampledToken | None]:
        """The next token of each row; logits and states stay as they are.

        `num_log_probs` is how many alternatives a row wants beside its token's log-probability, None for no
        log-probabilities. The result is None for a row without a possible token: its logits are NaN or infinite, or its
        settings forbid every token.
        """
        logits_BV = logits_BV.float() if logits_BV.dtype is torch.float64 else logits_BV
        ids = _sampled_ids(logits_BV, rows)
        wanted = [b for b, (token, num) in enumerate(zip(ids, num_log_probs, strict=True)) if None not in (token, num)]
        found = dict(_logprobs(logits_BV, wanted, ids, num_log_probs))
        return [None if token is None else SampledToken(token, *found.get(b, ())) for b, token in enumerate(ids)]


def _sampled_ids(logits_BV: Tensor, rows: Sequence[SamplingState]) -> list[int | None]:
    values, likeliest = blockwise_argmax(logits_BV)
    is_sound = torch.isfinite(values).tolist()
    ids: list[int | None] = [i if fine else None for i, fine in zip(likeliest.tolist(), is_sound, strict=True)]
    groups: dict[SamplingMode, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        if is_sound[position] and not row.is_plain:
            groups[_sampling_mode(row.sampling, logits_BV.shape[1])].append(position)
    for mode, members in groups.items():
        for slab in _slabs(members, logits_BV):
            found = _sample_group(mode, logits_BV, [rows[position] for position in slab], slab)
            for position, token in zip(slab, found, strict=True):
                ids[position] = token
    return ids


def _sampling_mode(sampling: SamplingConfig, vocab_size: int) -> SamplingMode:
    if sampling.temperature == 0:
        return "greedy"
    has_k = has_top_k(sampling, vocab_size)
    if sampling.top_p < 1 and not has_k:
        return "nucleus"  # which tokens stay depends on the probabilities of all
    return "filtered" if has_k or sampling.min_p else "all"


def _slabs(members: list[int], logits_BV: Tensor) -> Iterator[list[int]]:
    step = max(1, _SLAB.get(logits_BV.device.type, _LARGEST_SLAB) // logits_BV.shape[1])
    return (members[start : start + step] for start in range(0, len(members), step))


def _sample_group(
    mode: SamplingMode, logits_BV: Tensor, rows: Sequence[SamplingState], positions: Sequence[int]
) -> list[int | None]:
    """The ids of rows with one sampling mode; None where every token is forbidden."""
    scores_NW = _scores(logits_BV, rows, positions)
    peaks, likeliest = blockwise_argmax(scores_NW)
    peaks_N, ids_N = peaks.cpu().numpy(), likeliest.cpu().numpy()
    if mode != "greedy":
        temperatures_N = np.array([row.sampling.temperature for row in rows], dtype=np.float32)
        with np.errstate(all="ignore"):
            drawing = np.flatnonzero(np.isfinite(peaks_N / temperatures_N))  # the others' temperature is as good as 0
        if len(drawing):
            scores_NW = scores_NW if len(drawing) == len(rows) else scores_NW[drawing.tolist()]
            scores_NW.div_(torch.from_numpy(temperatures_N[drawing]).to(scores_NW.device)[:, None])
            ids_N[drawing] = _drawn(mode, scores_NW, [rows[number] for number in drawing.tolist()], logits_BV.shape[1])
    return [int(i) if peak > -math.inf else None for i, peak in zip(ids_N, peaks_N, strict=True)]


def _scores(logits_BV: Tensor, rows: Sequence[SamplingState], positions: Sequence[int]) -> Tensor:
    """[N, W] in float32 after all steps before the temperature; the columns behind the vocabulary are -inf."""
    vocab_size = logits_BV.shape[1]
    width = (vocab_size // BLOCK + 1) * BLOCK
    scores_NW = torch.empty(len(rows), width, device=logits_BV.device)
    scores_NW[:, :vocab_size] = logits_BV if len(rows) == len(logits_BV) else logits_BV[list(positions)]
    add_sequence_biases(scores_NW, rows)
    if any(row.has_edits for row in rows):
        apply_penalties(scores_NW, rows, vocab_size)
    forbid_tokens(scores_NW, rows)
    for number, row in enumerate(rows):
        if row.guide is not None:
            allowed = torch.from_numpy(row.guide.allowed(width)).to(scores_NW.device)
            scores_NW[number].masked_fill_(~allowed, -torch.inf)
    scores_NW[:, vocab_size:] = -torch.inf
    return scores_NW


def _drawn(mode: SamplingMode, scores_NW: Tensor, rows: Sequence[SamplingState], vocab_size: int) -> Ids:
    uniforms_N: Doubles = np.array([uniform(row.seed, len(row.new_ids)) for row in rows])
    if mode == "all":
        return draw_from_all(scores_NW, uniforms_N)
    exp_sums_N = exp_sums(scores_NW) if mode == "nucleus" else np.ones(len(rows))
    return draw_from_candidates(
        scores_NW, new_filters([row.sampling for row in rows], vocab_size), exp_sums_N, uniforms_N
    )


def _logprobs(
    logits_BV: Tensor, wanted: list[int], ids: Sequence[int | None], num_log_probs: Sequence[int | None]
) -> Iterator[tuple[int, tuple[float, Alternatives]]]:
    """(row, its token's log-probability and alternatives) of the rows that want them."""
    for slab in _slabs(wanted, logits_BV):
        tokens = [token for token in (ids[position] for position in slab) if token is not None]
        yield from zip(slab, logprobs(logits_BV[slab], tokens, [num_log_probs[position] or 0 for position in slab]),
                       strict=True)  # fmt: skip


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


def draw_from_candidates(scores_NW: Tensor, filters: Filters, exp_sums_N: Doubles, uniforms_N: Doubles) -> Ids:
    """An id of each row among those that its filters keep; `exp_sums_N` as `candidates` needs them."""
    candidates_NC, ids_NC = candidates(scores_NW, filters, exp_sums_N)
    weights_NC = np.exp(candidates_NC - candidates_NC.max(axis=1, keepdims=True))
    sums_NC = running_sums(weights_NC * keep_mask(candidates_NC, filters, exp_sums_N))
    columns_N = _first_above(sums_NC, uniforms_N * sums_NC[:, -1])
    drawn: Ids = np.take_along_axis(ids_NC, columns_N[:, None], axis=1)[:, 0]
    return drawn


def _first_above(sums_NC: Doubles, targets_N: Doubles) -> Ids:
    """The first column whose sum exceeds the target; where rounding leaves none, the last that adds to the sum."""
    rows = zip(sums_NC, targets_N, strict=True)
    columns = [min(sums.searchsorted(target, "right"), sums.searchsorted(sums[-1])) for sums, target in rows]
    return np.array(columns, dtype=np.int64)


def blockwise_argmax(scores_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value [B] of each row and its first id [B]; an arbitrary id where the value is NaN.

    Through the maxima of blocks: a maximum alone is many times faster than one with its index, in bfloat16 above all.
    """
    width = scores_BV.shape[1]
    maxima_BK = block_maxima(scores_BV)
    values = maxima_BK.amax(-1, keepdim=True)
    start = _first(maxima_BK == values) * BLOCK
    columns = (start + torch.arange(BLOCK, device=scores_BV.device)).clamp_(max=width - 1)
    column = _first(scores_BV.gather(1, columns) == values)
    return values[:, 0], columns.gather(1, column)[:, 0]


def block_maxima(scores_BV: Tensor) -> Tensor:
    """The largest of each block [B, K]; the last block may be short."""
    width = scores_BV.shape[1]
    whole = width - width % BLOCK
    maxima_BK = scores_BV[:, :whole].view(len(scores_BV), whole // BLOCK, BLOCK).amax(-1)
    return maxima_BK if whole == width else torch.cat([maxima_BK, scores_BV[:, whole:].amax(-1, keepdim=True)], dim=1)


def top_logprobs(log_probs_NV: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest (id, nats) of each row, `counts` of them, best first and the lower id first where equal."""
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
    if count and values_C[-1] == values_C[count - 1]:  # there may be more of that value
        ids_C = (log_probs_V >= float(values_C[-1])).nonzero()[:, 0].cpu().numpy()
        values_C = log_probs_V.cpu().numpy()[ids_C]
    order = np.lexsort((ids_C, -values_C))[:count]
    return tuple(zip(ids_C[order].tolist(), values_C[order].tolist(), strict=True))


def _first(flags_BN: Tensor) -> Tensor:
    """[B, 1]: the first true column, 0 where there is none."""
    return flags_BN.to(torch.uint8).argmax(-1, keepdim=True)


def logprobs(logits_NV: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[tuple[float, Alternatives]]:
    """Each id's nats under its row of raw logits, in float32, and the likeliest (id, nats), best first."""
    log_probs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen = torch.tensor(ids, device=logits_NV.device)
    values = log_probs_NV.gather(1, chosen[:, None])[:, 0].tolist()
    return list(zip(values, top_logprobs(log_probs_NV, counts), strict=True))
