"""Losses of examples under prompts, without gradient: what validation, evaluation and label likelihood read.

Every loss reported covers the same tokens for the bare base, for ours and for anybody else's prompt, those of
`Example.text_mask` (text tokens with a real predecessor in the bare input). EOS is summed apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss.chunked import nll
from softprompt.loss.objective import SLOTS_PER_BATCH, ObjectiveWeights, by_length, num_labels
from softprompt.splice import Row, Targets, column_states, run_prompts, target_states
from softprompt.types import Example


@dataclass(frozen=True)
class RowScore:
    """Summed negative log-likelihood of one example, in nats, and how many tokens it covers."""

    text_nats: float
    num_text: int
    eos_nats: float
    num_eos: int


def score_examples(base: Base, forward: Forward, examples: Sequence[Example], prompt: Tensor | None) -> list[RowScore]:
    """One score per example, in order, under one prompt [P, H] or, with None, under the bare base."""
    pairs = [(example, None if prompt is None else 0) for example in examples]
    return score_under(base, forward, pairs, [] if prompt is None else [prompt])


def score_under(
    base: Base,
    forward: Forward,
    examples: Sequence[tuple[Example, int | None]],
    prompts: Sequence[Tensor],
    heads: Sequence[ObjectiveWeights | None] = (),
) -> list[RowScore]:
    """One score per example, in order, each under the prompt [P, H] that it names, or under the bare base.

    `heads` has for each prompt what reads its examples' columns; nats of those are per label.
    """
    of_heads = [number for number, (example, _) in enumerate(examples) if example.columns]
    if of_heads:
        by_number = dict(zip(of_heads, _head_scores(base, forward, [examples[i] for i in of_heads], prompts, heads),
                             strict=True))  # fmt: skip
        rest = [number for number in range(len(examples)) if number not in by_number]
        others = score_under(base, forward, [examples[number] for number in rest], prompts) if rest else []
        by_number |= dict(zip(rest, others, strict=True))
        return [by_number[number] for number in range(len(examples))]
    used = sorted({index for _, index in examples if index is not None})
    position = {index: number for number, index in enumerate(used)}
    rows = [_scored_row(example, None if index is None else position[index]) for example, index in examples]
    losses = target_nlls(base, forward, rows, [prompts[index] for index in used])
    return [_row_score(example, loss) for (example, _), loss in zip(examples, losses, strict=True)]


@torch.no_grad()
def target_nlls(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], batch_tokens: int = SLOTS_PER_BATCH
) -> list[dict[int, float]]:
    """For each row, the nats of each target by its index among the row's ids. Rows are batched by length."""
    result: list[dict[int, float]] = [{} for _ in rows]
    for found in _states(base, forward, rows, prompts, batch_tokens):
        for index, losses in zip(found.batch, _nlls(base, forward, found), strict=True):
            result[index] = losses
    return result


@torch.no_grad()
def alternative_nlls(
    base: Base,
    forward: Forward,
    rows: Sequence[Row],
    alternatives: Sequence[Sequence[int]],
    prompts: Sequence[Tensor],
    batch_tokens: int = SLOTS_PER_BATCH,
) -> list[list[float]]:
    """For each row, the nats of all its targets, once with each of its alternatives in the place of the last.

    A text is read once for labels that differ in their last token alone, as those of one token do.
    """
    result: list[list[float]] = [[] for _ in rows]
    for found in _states(base, forward, rows, prompts, batch_tokens):
        wanted = [alternatives[index] for index in found.batch]
        for index, own in zip(found.batch, _alternatives(base, forward, found, wanted), strict=True):
            result[index] = own
    return result


@dataclass(frozen=True)
class _States:
    """The hidden states of one forward that predict its rows' targets."""

    batch: list[int]  # numbers of the rows
    hidden_ND: Tensor
    targets: Targets


def _states(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], batch_tokens: int
) -> Iterator[_States]:
    prefix = run_prompts(base, forward, prompts) if prompts and forward.can_share_prefix else None
    lengths = [row.num_tokens + (0 if row.prompt is None else prompts[row.prompt].shape[0]) for row in rows]
    for batch in by_length(lengths, batch_tokens):
        yield _States(batch, *target_states(base, forward, [rows[index] for index in batch], prompts, prefix))


def _alternatives(base: Base, forward: Forward, found: _States, wanted: Sequence[Sequence[int]]) -> list[list[float]]:
    """The normaliser of a row's last target is that of its own id; the logits of alternatives are compared with it."""
    nlls = _nlls(base, forward, found)
    last = {owner: number for number, owner in enumerate(found.targets.rows.tolist())}
    slots = torch.tensor([last[row] for row in range(len(found.batch))], device=found.hidden_ND.device)
    own = found.targets.ids[slots].tolist()
    ids = sorted({*own, *(each for some in wanted for each in some)})
    logits = forward.head.logits_of(found.hidden_ND[slots], torch.tensor(ids, device=slots.device)).double().tolist()
    number = {each: place for place, each in enumerate(ids)}
    return [
        [sum(nats.values()) + row[number[mine]] - row[number[each]] for each in some]
        for nats, row, mine, some in zip(nlls, logits, own, wanted, strict=True)
    ]


def _scored_row(example: Example, prompt: int | None) -> Row:
    wanted = [text or eos for text, eos in zip(example.text_mask, example.eos_mask, strict=True)]
    return Row.of(example, prompt, wanted)


@torch.no_grad()
def _head_scores(
    base: Base,
    forward: Forward,
    examples: Sequence[tuple[Example, int | None]],
    prompts: Sequence[Tensor],
    heads: Sequence[ObjectiveWeights | None],
) -> list[RowScore]:
    """The loss of examples with columns. Examples whose losses depend on each other are one batch."""
    result: dict[int, RowScore] = {}
    for index in sorted({index for _, index in examples if index is not None}):
        head = heads[index]
        assert head is not None, "examples with columns have an objective"
        numbers = [number for number, (_, own) in enumerate(examples) if own == index]
        rows = [Row.of(examples[number][0], 0, ()) for number in numbers]
        lengths = [row.num_tokens + prompts[index].shape[0] for row in rows]
        for batch in [list(range(len(rows)))] if head.objective.is_joint else by_length(lengths, SLOTS_PER_BATCH):
            some = [rows[number] for number in batch]
            states_ND, owners_N = column_states(base, forward, some, [prompts[index]])
            nats = head.objective.row_nats(states_ND, owners_N, some, head.weights).tolist()
            for number, row, own in zip(batch, some, nats, strict=True):
                result[numbers[number]] = RowScore(text_nats=own, num_text=num_labels(row), eos_nats=0.0, num_eos=0)
    return [result[number] for number in range(len(examples))]


def _row_score(example: Example, losses: dict[int, float]) -> RowScore:
    eos = len(example.ids) - 1 if any(example.eos_mask) else None
    text = [nats for column, nats in losses.items() if column != eos]
    eos_nats = losses[eos] if eos is not None else 0.0
    return RowScore(text_nats=sum(text), num_text=len(text), eos_nats=eos_nats, num_eos=int(eos is not None))


def _nlls(base: Base, forward: Forward, found: _States) -> list[dict[int, float]]:
    wanted = found.targets
    losses = nll(forward.head, found.hidden_ND, wanted.ids, base.vocab_size).tolist()
    result: list[dict[int, float]] = [{} for _ in found.batch]
    for owner, column, loss in zip(wanted.rows.tolist(), wanted.columns.tolist(), losses, strict=True):
        result[owner][column] = loss
    return result
