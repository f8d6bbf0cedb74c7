"""Held-out loss of trials, in slices, each prompt with its own rows in the same passes.

K trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import score_under
from softprompt.training.ranks import Ranks, most_shared, share
from softprompt.training.trial import Trial
from softprompt.types import Example

_TOKENS_PER_SLICE = 2_048


@dataclass(frozen=True)
class ValidationSlice:
    """A bounded part of a validation."""

    sums_K2: Tensor  # float64: nats and tokens of each trial
    num_tokens: int


def validation_slices(base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks) -> Iterator[ValidationSlice]:
    """The trials' validation rows that are this rank's, each under its own prompt.

    Where the ranks run in step, a row at a time: as many forwards everywhere, the spare ones for nothing.
    """
    prompts = [trial.prompt() for trial in trials]
    pairs = [(example, index) for index, trial in enumerate(trials) for example in trial.validation]
    mine = share(pairs, [len(example.ids) for example, _ in pairs], ranks)
    for chosen in [[pair] for pair in mine] if ranks.in_step else _cut(mine):
        sums_K2 = torch.zeros(len(trials), 2, dtype=torch.float64)
        for (_, index), score in zip(chosen, score_under(base, forward, chosen, prompts), strict=True):
            sums_K2[index] += torch.tensor([score.text_nats, score.num_text], dtype=torch.float64)
        yield ValidationSlice(sums_K2.to(base.device), sum(len(example.ids) for example, _ in chosen))
    for _ in range(most_shared(len(pairs), ranks) - len(mine) if ranks.in_step else 0):
        score_under(base, forward, pairs[:1], prompts)


def _cut(pairs: Sequence[tuple[Example, int]]) -> list[list[tuple[Example, int]]]:
    slices: list[list[tuple[Example, int]]] = []
    room = 0
    for pair in pairs:
        if not slices or len(pair[0].ids) > room:
            slices.append([])
            room = _TOKENS_PER_SLICE
        slices[-1].append(pair)
        room -= len(pair[0].ids)
    return slices
