"""The held-out loss of prompts against the bare base, on the same tokens, with a paired bootstrap interval.

A loss is summed negative log-likelihood over the text tokens divided once by their number: never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import RowScore, score_examples
from softprompt.prompt import SoftPrompt
from softprompt.types import ExampleSet

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
    worse_rows: tuple[int, ...]  # and of those that it makes worse

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
        results.append(_measured(set_name, None, examples, bare, None, seed))
        for name, prompt in prompts.items():
            scores = score_examples(base, forward, examples.examples, prompt.tensor)
            results.append(_measured(set_name, name, examples, scores, bare, seed))
    return results


def mean_loss(scores: Sequence[RowScore]) -> float:
    """Nats per text token over all rows; NaN where no row has any."""
    num_text = sum(score.num_text for score in scores)
    return sum(score.text_nats for score in scores) / num_text if num_text else math.nan


def _measured(
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

    def per_count(gap: np.ndarray, count: np.ndarray, axis: int) -> np.ndarray:
        ratio: np.ndarray = gap.sum(axis=axis) / np.maximum(count.sum(axis=axis), 1)
        return ratio

    found = stats.bootstrap(
        (np.array(gaps), np.array(counts)), per_count, paired=True, vectorized=True, n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))
