"""Loss on held-out rows: each prompt against the bare base on the same tokens, and a prompt without each virtual token.

A loss is summed negative log-likelihood over the text tokens, divided once by their number: never a mean of means.
Intervals are paired bootstraps over rows.

P prompt length, H embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.data.tokens import fit_source
from softprompt.errors import ConfigError, DataError, LengthError
from softprompt.families import Forward
from softprompt.loss import ObjectiveWeights, RowScore, objective, score_examples, score_under
from softprompt.prompt import SoftPrompt
from softprompt.types import Example, ExampleSet


def contenders(prompts: Mapping[str, SoftPrompt]) -> list[tuple[str | None, SoftPrompt | None]]:
    """Name and prompt of each contender; both are None for the bare base, which comes first."""
    return [(None, None), *prompts.items()]


def max_text_tokens(base: Base, prompt: SoftPrompt | None, max_length: int | None = None) -> int:
    """The most tokens of text beside the prompt, special ones included; `max_length` at most."""
    own = base.max_length - (prompt.num_virtual_tokens if prompt is not None else 0)
    return own if max_length is None else min(own, max_length)


def truncate_start(base: Base, ids: tuple[int, ...], limit: int, *, is_chat: bool = False) -> tuple[int, ...]:
    """At most `limit` of the ids (BOS included): BOS and the end, as in training.

    Of an encoder-decoder, what its encoder reads: its start, or its end where it is a chat, as in training.
    Raises LengthError where not even one token fits.
    """
    if base.kind == "seq2seq":
        return fit_source(base, ids, limit, keep_end=is_chat)
    special = base.bos_ids if ids[: len(base.bos_ids)] == base.bos_ids else ()
    kept = limit - len(special)
    if kept < 1:
        raise LengthError(f"no text fits before the answer in {limit} tokens; use fewer virtual tokens")
    return special + ids[len(special) :][-kept:]


def examples_under(examples: Sequence[Example], prompt: SoftPrompt | None) -> Sequence[Example]:
    """The examples with what a prompt itself decides: whether it has vectors for the decoder."""
    has_decoder_prompt = prompt is not None and prompt.num_decoder_tokens > 0
    return [
        replace(each, has_decoder_prompt=has_decoder_prompt) if each.has_decoder_prompt != has_decoder_prompt else each
        for each in examples
    ]


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
    loss: float  # nats per text token, or per label of heads and label words; NaN where no row has any
    num_rows: int
    num_tokens: int  # or labels
    eos_loss: float | None  # nats per supervised EOS; None where there is none
    difference: float | None  # loss minus the base's, on the same tokens; below 0 is better
    interval: Interval | None  # of the difference, over rows, at 95 %; None for a single row
    better_rows: tuple[int, ...]  # source indices of the rows that the prompt makes better
    worse_rows: tuple[int, ...]  # and of the rows that it makes worse
    is_of_labels: bool = False  # counted over what a head or label words find

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
        indices = [example.row for example in examples.examples]
        results.append(held_out_loss(set_name, None, indices, bare, None, seed))
        for name, prompt in prompts.items():
            scores = score_examples(base, forward, examples_under(examples.examples, prompt), prompt.tensor)
            results.append(held_out_loss(set_name, name, indices, scores, bare, seed))
    return results


def mean_loss(scores: Sequence[RowScore]) -> float:
    """Nats per text token over all rows; NaN where no row has any."""
    num_text = sum(score.num_text for score in scores)
    return sum(score.text_nats for score in scores) / num_text if num_text else math.nan


def held_out_loss(
    set_name: str,
    prompt: str | None,
    indices: Sequence[int],
    scores: list[RowScore],
    bare: list[RowScore] | None,
    seed: int,
    *,
    is_of_labels: bool = False,
) -> HeldOutLoss:
    """Of one contender: its rows' scores, and the bare base's if that is another; `indices` are those in the source."""
    num_eos = sum(score.num_eos for score in scores)
    num_tokens = sum(score.num_text for score in scores)
    reference = bare if num_tokens else None
    gaps = [(row, a.text_nats - b.text_nats) for row, a, b in zip(indices, scores, bare or scores, strict=True)]
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
        is_of_labels=is_of_labels,
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
    """The losses of a whole prompt and of the prompt without each virtual token, the decoder's after the encoder's."""

    loss: float  # the whole prompt's, nats per text token
    num_rows: int  # with at least one text token
    num_tokens: int
    left_out: tuple[LeftOut, ...]  # one per virtual token, in order


def leave_one_out(
    base: Base, forward: Forward, examples: Sequence[Example], prompt: SoftPrompt, seed: int = 0
) -> LeaveOneOut:
    """The loss of a prompt, and of it without each of its P virtual tokens, over the examples' text tokens or labels.

    The positions of a row follow the P - 1 others directly, without a gap. `seed` is the bootstrap's.
    Raises DataError where no example has a text token that every contender predicts, ConfigError for a single virtual
    token beside a head, without which the head has nothing to read.
    """
    counted = [example for example in examples_under(examples, prompt) if any(example.text_mask) or example.columns]
    own = objective(base, forward, prompt.record.form)
    head = None if own is None else ObjectiveWeights(own, prompt.head)
    if head is not None and len(prompt.tensor) == 1:
        raise ConfigError("a prompt of one virtual token with a head has nothing that could be left out")
    if not counted:
        raise DataError(f"none of the {len(examples):,} held-out rows has a text token after another; give longer rows")
    variants = [_Variant(prompt.tensor, prompt.num_decoder_tokens), *_without_each(prompt)]
    whole, *without = _score_variants(base, forward, counted, variants, head)
    return LeaveOneOut(
        loss=mean_loss(whole),
        num_rows=len(whole),
        num_tokens=sum(score.num_text for score in whole),
        left_out=tuple(_left_out(token, scores, whole, seed) for token, scores in enumerate(without)),
    )


class _Variant(NamedTuple):
    """A prompt with all or some of its vectors."""

    tensor: Tensor | None  # None: nothing is left
    num_decoder_tokens: int  # of them, in front of the decoder's tokens


def _without_each(prompt: SoftPrompt) -> list[_Variant]:
    """The prompt without each of its vectors."""
    vectors, num_encoder = prompt.tensor, prompt.num_virtual_tokens
    if len(vectors) == 1:
        return [_Variant(None, 0)]
    return [
        _Variant(
            torch.cat([vectors[:token], vectors[token + 1 :]]), prompt.num_decoder_tokens - int(token >= num_encoder)
        )
        for token in range(len(vectors))
    ]


def _score_variants(
    base: Base, forward: Forward, examples: Sequence[Example], variants: Sequence[_Variant],
    head: ObjectiveWeights | None,
) -> list[list[RowScore]]:  # fmt: skip
    passes = [variants[first : first + MAX_PROMPTS_PER_PASS] for first in range(0, len(variants), MAX_PROMPTS_PER_PASS)]
    return [scores for some in passes for scores in _score_pass(base, forward, examples, some, head)]


def _score_pass(
    base: Base, forward: Forward, examples: Sequence[Example], variants: Sequence[_Variant],
    head: ObjectiveWeights | None,
) -> list[list[RowScore]]:  # fmt: skip
    """The scores of every example under each variant, all of them rows of one splice."""
    prompts = [variant.tensor for variant in variants if variant.tensor is not None]
    numbers = iter(range(len(prompts)))
    owners = [None if variant.tensor is None else next(numbers) for variant in variants]
    pairs = [
        (_under_variant(example, variant), owner)
        for owner, variant in zip(owners, variants, strict=True)
        for example in examples
    ]
    heads = () if head is None else ([head] * len(prompts),)
    scores = iter(score_under(base, forward, pairs, prompts, *heads))
    return [[next(scores) for _ in examples] for _ in variants]


def _under_variant(example: Example, variant: _Variant) -> Example:
    if not example.has_decoder_prompt:
        return example
    return replace(example, num_decoder_tokens=variant.num_decoder_tokens)


def _left_out(token: int, without: Sequence[RowScore], whole: Sequence[RowScore], seed: int) -> LeftOut:
    return LeftOut(
        token=token,
        loss=mean_loss(without),
        difference=mean_loss(without) - mean_loss(whole),
        interval=paired_interval(without, whole, seed),
    )
