"""Loss on held-out rows: each prompt against the bare base on the same tokens, and a prompt without each virtual token.

A loss is summed negative log-likelihood over the text tokens, divided once by their number: never a mean of means.
Intervals are paired bootstraps over rows.

P prompt length, H embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.errors import DataError, LengthError
from softprompt.families import Forward
from softprompt.loss import RowScore, score_examples, score_under
from softprompt.prompt import SoftPrompt
from softprompt.types import Example, ExampleSet


def contenders(prompts: Mapping[str, SoftPrompt]) -> list[tuple[str | None, SoftPrompt | None]]:
    """Name and prompt of each contender; both are None for the bare base, which comes first."""
    return [(None, None), *prompts.items()]


def max_text_tokens(base: Base, prompt: SoftPrompt | None, max_length: int | None = None) -> int:
    """The most tokens of text beside the prompt, special ones included; `max_length` at most."""
    own = base.max_length - (prompt.num_virtual_tokens if prompt is not None else 0)
    return own if max_length is None else min(own, max_length)


def truncate_start(base: Base, ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """At most `limit` of the ids (BOS included): BOS and the end, as in training.

    Raises LengthError where not even one token fits.
    """
    special = base.bos_ids if ids[: len(base.bos_ids)] == base.bos_ids else ()
    kept = limit - len(special)
    if kept < 1:
        raise LengthError(f"no text fits before the answer in {limit} tokens; use fewer virtual tokens")
    return special + ids[len(special) :][-kept:]


NUM_RESAMPLES = 2_000
CONFIDENCE = 0.95
_LARGEST_EXPONENT = 700.0  # of e in a float


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class HeldOutLoss:
    """One prompt (or, with `prompt` None, the bare base) on one held-out set."""

    held_out: str  # the set's name
    prompt: str | None
    loss: float  # nats per text token; NaN where no row has any
    num_rows: int
    num_tokens: int
    eos_loss: float | None  # nats per supervised EOS; None where there is none
    difference: float | None  # loss minus the base's, on the same tokens; below 0 is better
    interval: Interval | None  # of the difference, over rows, at 95 %; None for a single row
    better_rows: tuple[int, ...]  # source indices of the rows that the prompt makes better
    worse_rows: tuple[int, ...]  # and of the rows that it makes worse

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, _LARGEST_EXPONENT))


def held_out_losses(
    base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], sets: Mapping[str, ExampleSet], seed: int = 0
) -> list[HeldOutLoss]:
    """The bare base and each prompt on each set. `seed` is the bootstrap's."""
    results = []
    for set_name, examples in sets.items():
        bare = score_examples(base, forward, examples.examples, None)
        results.append(_held_out_loss(set_name, None, examples, bare, None, seed))
        for name, prompt in prompts.items():
            scores = score_examples(base, forward, examples.examples, prompt.tensor)
            results.append(_held_out_loss(set_name, name, examples, scores, bare, seed))
    return results


def mean_loss(scores: Sequence[RowScore]) -> float:
    """Nats per text token over all rows; NaN where no row has any."""
    num_text = sum(score.num_text for score in scores)
    return sum(score.text_nats for score in scores) / num_text if num_text else math.nan


def _held_out_loss(
    set_name: str,
    prompt: str | None,
    examples: ExampleSet,
    scores: list[RowScore],
    bare: list[RowScore] | None,
    seed: int,
) -> HeldOutLoss:
    num_eos = sum(score.num_eos for score in scores)
    num_tokens = sum(score.num_text for score in scores)
    reference = bare if num_tokens else None
    gaps = [
        (e.row, a.text_nats - b.text_nats) for e, a, b in zip(examples.examples, scores, bare or scores, strict=True)
    ]
    return HeldOutLoss(
        held_out=set_name,
        prompt=prompt,
        loss=mean_loss(scores),
        num_rows=len(scores),
        num_tokens=num_tokens,
        eos_loss=sum(score.eos_nats for score in scores) / num_eos if num_eos else None,
        difference=mean_loss(scores) - mean_loss(reference) if reference is not None else None,
        interval=paired_interval(scores, reference, seed) if reference is not None else None,
        better_rows=tuple(row for row, gap in gaps if gap < 0),
        worse_rows=tuple(row for row, gap in gaps if gap > 0),
    )


def paired_interval(ours: Sequence[RowScore], bare: Sequence[RowScore], seed: int) -> Interval | None:
    """Percentile bootstrap over rows of the difference in nats per token; None for a single row."""
    gaps = [a.text_nats - b.text_nats for a, b in zip(ours, bare, strict=True)]
    return bootstrap_interval(gaps, [score.num_text for score in ours], seed)


def bootstrap_interval(gaps: Sequence[float], counts: Sequence[int], seed: int) -> Interval | None:
    """Percentile bootstrap over rows of summed gaps divided by summed counts; None for a single row."""
    if len(gaps) < 2:
        return None
    from scipy import stats  # half a second, and only a comparison needs it

    def per_count(gap: np.ndarray, count: np.ndarray, axis: int) -> np.ndarray:
        ratio: np.ndarray = gap.sum(axis=axis) / np.maximum(count.sum(axis=axis), 1)
        return ratio

    found = stats.bootstrap(
        (np.array(gaps), np.array(counts)), per_count, paired=True, vectorized=True, n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


MAX_PROMPTS_PER_PASS = 8  # few, so that memory does not grow with P


@dataclass(frozen=True)
class LeftOut:
    """A prompt without one of its virtual tokens."""

    token: int  # zero-based position of the virtual token in the whole prompt
    loss: float  # nats per text token, of the other P - 1 (of the bare base where P is 1)
    difference: float  # loss minus the whole prompt's; above 0: the token helps
    interval: Interval | None  # of the difference, over rows, at 95 %; None for a single row


@dataclass(frozen=True)
class LeaveOneOut:
    """The losses of a whole prompt and of the prompt without each virtual token."""

    loss: float  # the whole prompt's, nats per text token
    num_rows: int  # with at least one text token
    num_tokens: int
    left_out: tuple[LeftOut, ...]  # one per virtual token, in order


def leave_one_out(
    base: Base, forward: Forward, examples: Sequence[Example], prompt: SoftPrompt, seed: int = 0
) -> LeaveOneOut:
    """The loss of a prompt, and of it without each of its P virtual tokens, over the examples' text tokens.

    The positions of a row follow the P - 1 others directly, without a gap. `seed` is the bootstrap's.
    Raises DataError where no example has a text token that every contender predicts.
    """
    counted = [example for example in examples if any(example.text_mask)]
    if not counted:
        raise DataError(f"none of the {len(examples):,} held-out rows has a text token after another; give longer rows")
    variants = [prompt.tensor, *_without_each(prompt.tensor)]
    whole, *without = _score_variants(base, forward, counted, variants)
    return LeaveOneOut(
        loss=mean_loss(whole),
        num_rows=len(whole),
        num_tokens=sum(score.num_text for score in whole),
        left_out=tuple(_left_out(token, scores, whole, seed) for token, scores in enumerate(without)),
    )


def _without_each(prompt_PH: Tensor) -> list[Tensor | None]:
    """The prompt without each of its tokens, [P - 1, H]; None for a prompt of one token."""
    length = prompt_PH.shape[0]
    if length == 1:
        return [None]
    return [torch.cat([prompt_PH[:token], prompt_PH[token + 1 :]]) for token in range(length)]


def _score_variants(
    base: Base, forward: Forward, examples: Sequence[Example], variants: Sequence[Tensor | None]
) -> list[list[RowScore]]:
    passes = [variants[first : first + MAX_PROMPTS_PER_PASS] for first in range(0, len(variants), MAX_PROMPTS_PER_PASS)]
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
