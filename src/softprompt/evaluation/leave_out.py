"""What each virtual token is worth: the held-out loss of a prompt without it, on the same tokens as the whole prompt.

P prompt length, H embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.errors import DataError
from softprompt.evaluation.heldout import Interval, mean_loss, paired_interval
from softprompt.families import Forward
from softprompt.loss import RowScore, score_under
from softprompt.prompt import SoftPrompt
from softprompt.types import Example

_PROMPTS_PER_PASS = 8  # few, so that memory does not grow with P


@dataclass(frozen=True)
class LeftOut:
    """A prompt without one of its virtual tokens."""

    token: int  # zero-based position of the virtual token in the whole prompt
    loss: float  # nats per text token, of the other P - 1 (of the bare base where P is 1)
    difference: float  # loss minus the whole prompt's; above 0: the token helps
    interval: Interval | None  # of the difference, over rows, at 95 %; None for a single row


@dataclass(frozen=True)
class LeaveOneOut:
    """A whole prompt, and what becomes of it without each virtual token."""

    loss: float  # the whole prompt's, nats per text token
    num_rows: int  # with at least one text token
    num_tokens: int
    left_out: tuple[LeftOut, ...]  # one per virtual token, in order


def leave_one_out(
    base: Base, forward: Forward, examples: Sequence[Example], prompt: SoftPrompt, seed: int = 0
) -> LeaveOneOut:
    """The loss of a prompt, and of it without each of its P virtual tokens, over the examples' text tokens.

    A row stands behind the P - 1 others directly: positions close up. `seed` is the bootstrap's.
    Raises DataError where no example has a text token that every contender predicts.
    """
    counted = [example for example in examples if any(example.text_mask)]
    if not counted:
        raise DataError(
            f"none of the {len(examples):,} held-out rows has a text token with another before it; give longer rows"
        )
    variants = [prompt.tensor, *_shortened(prompt.tensor)]
    whole, *without = _score_variants(base, forward, counted, variants)
    return LeaveOneOut(
        loss=mean_loss(whole),
        num_rows=len(whole),
        num_tokens=sum(score.num_text for score in whole),
        left_out=tuple(_left_out(token, scores, whole, seed) for token, scores in enumerate(without)),
    )


def _shortened(prompt_PH: Tensor) -> list[Tensor | None]:
    """The prompt without each of its tokens, [P - 1, H]; None where nothing is left."""
    length = prompt_PH.shape[0]
    if length == 1:
        return [None]
    return [torch.cat([prompt_PH[:token], prompt_PH[token + 1 :]]) for token in range(length)]


def _score_variants(
    base: Base, forward: Forward, examples: Sequence[Example], variants: Sequence[Tensor | None]
) -> list[list[RowScore]]:
    passes = [variants[first : first + _PROMPTS_PER_PASS] for first in range(0, len(variants), _PROMPTS_PER_PASS)]
    return [scores for some in passes for scores in _score_pass(base, forward, examples, some)]


def _score_pass(
    base: Base, forward: Forward, examples: Sequence[Example], variants: Sequence[Tensor | None]
) -> list[list[RowScore]]:
    """The scores of every example under each variant, all of them rows of one splice."""
    prompts = [variant for variant in variants if variant is not None]
    numbers = iter(range(len(prompts)))
    owners = [None if variant is None else next(numbers) for variant in variants]
    pairs = [(example, owner) for owner in owners for example in examples]
    scores = iter(score_under(base, forward, pairs, prompts))
    return [[next(scores) for _ in examples] for _ in variants]


def _left_out(token: int, without: Sequence[RowScore], whole: Sequence[RowScore], seed: int) -> LeftOut:
    return LeftOut(
        token=token,
        loss=mean_loss(without),
        difference=mean_loss(without) - mean_loss(whole),
        interval=paired_interval(without, whole, seed),
    )
