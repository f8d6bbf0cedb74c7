"""Prompt log-probabilities: those of a request's own text, computed in the chunks in which it is read.

N tokens of texts, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.engine.request import Request, TokenLogProb
from softprompt.engine.sampler import Alternatives, logprobs
from softprompt.engine.sequence import Sequence
from softprompt.families import Forward

_MAX_LOGITS = 2**24  # at a time: 64 MiB in float32


def new_prompt_logprobs(request: Request) -> list[TokenLogProb | None] | None:
    """Those of a text of which nothing was run; None where none are wanted."""
    if request.num_text_log_probs is None:
        return None
    return [] if request.prompt is not None else [None]  # nothing predicts the bare base's first token


def extend_prompt_logprobs(
    base: Base, forward: Forward, prompt_states: SequenceOf[tuple[Sequence, Tensor]]
) -> list[Sequence]:
    """Extend each sequence's by what its hidden states [N, D] predict; sequences where that is NaN are returned."""
    due = [(sequence, token) for sequence, states in prompt_states for token in _next_ids(sequence, len(states))]
    states_ND = torch.cat([states for _, states in prompt_states])
    for (sequence, token), (log_prob, alternatives) in zip(due, _logprobs(base, forward, due, states_ND), strict=True):
        assert sequence.prompt_log_probs is not None
        sequence.prompt_log_probs.append(TokenLogProb(token, log_prob, alternatives))
    return [sequence for sequence, states in prompt_states if _has_nan(sequence, len(states))]


def _next_ids(sequence: Sequence, count: int) -> tuple[int, ...]:
    first = len(sequence.prompt_log_probs or ())
    return sequence.request.ids[first : first + count]


def _logprobs(
    base: Base, forward: Forward, due: SequenceOf[tuple[Sequence, int]], states_ND: Tensor
) -> Iterator[tuple[float, Alternatives]]:
    size = max(1, _MAX_LOGITS // base.vocab_size)
    for start in range(0, len(due), size):
        block = due[start : start + size]
        logits_NV = forward.logits(states_ND[start : start + size])
        counts = [sequence.request.num_text_log_probs or 0 for sequence, _ in block]
        yield from logprobs(logits_NV, [token for _, token in block], counts)


def _has_nan(sequence: Sequence, num_new: int) -> bool:
    new = (sequence.prompt_log_probs or [])[-num_new:] if num_new else []
    return any(each is not None and math.isnan(each.log_prob) for each in new)
