"""Log-probabilities of the texts that rows read, found in the pieces in which they are read.

N tokens of texts, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.engine.request import Request, TokenLogProb
from softprompt.engine.sampler import Alternatives, report
from softprompt.engine.sequence import Row
from softprompt.families import Forward

_MOST_SCORES = 2**24  # logits at a time: 64 MiB in float32


def new_report(request: Request) -> list[TokenLogProb | None] | None:
    """The beginning of what is told of a text; None where nothing shall be."""
    if request.num_text_log_probs is None:
        return None
    return [] if request.prompt is not None else [None]  # nothing stands before the bare base's first token


def report_texts(base: Base, forward: Forward, telling: Sequence[tuple[Row, Tensor]]) -> list[Row]:
    """Add to each row what hidden states [N, D] tell of its text's next tokens; rows where that is NaN come back."""
    due = [(row, token) for row, states in telling for token in _next_ids(row, len(states))]
    states_ND = torch.cat([states for _, states in telling])
    for (row, token), (log_prob, alternatives) in zip(due, _reports(base, forward, due, states_ND), strict=True):
        assert row.text_log_probs is not None
        row.text_log_probs.append(TokenLogProb(token, log_prob, alternatives))
    return [row for row, states in telling if _has_nan(row, len(states))]


def _next_ids(row: Row, count: int) -> tuple[int, ...]:
    first = len(row.text_log_probs or ())
    return row.request.ids[first : first + count]


def _reports(
    base: Base, forward: Forward, due: Sequence[tuple[Row, int]], states_ND: Tensor
) -> Iterator[tuple[float, Alternatives]]:
    size = max(1, _MOST_SCORES // base.vocab_size)
    for start in range(0, len(due), size):
        block = due[start : start + size]
        logits_NV = forward.logits(states_ND[start : start + size])
        counts = [row.request.num_text_log_probs or 0 for row, _ in block]
        yield from report(logits_NV, [token for _, token in block], counts)


def _has_nan(row: Row, num_new: int) -> bool:
    new = (row.text_log_probs or [])[-num_new:] if num_new else []
    return any(each is not None and math.isnan(each.log_prob) for each in new)
