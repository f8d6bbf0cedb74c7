"""Answers of a frozen base, each row under its own soft prompt or none, in one batch.

Exact: a row's answer is the one it gives alone, and the one of transformers' `generate` on concatenated embeddings
whose processors are fed the text's real ids. Rows that have ended leave the batch.

B rows still running, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.engine.sampling import Sampler
from softprompt.errors import BaseModelError, LengthError, PromptError
from softprompt.families import Forward, forward_of, new_cache
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, append, concatenate, keep

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One generation asked for: the text's token ids (BOS included) and the soft prompt to put before them."""

    ids: tuple[int, ...]
    prompt: SoftPrompt | None = None


@dataclass(frozen=True)
class Answer:
    """What came out. `log_probs` are nats under the raw distribution, before penalties and temperature."""

    ids: tuple[int, ...]  # without the token that ended it
    text: str
    finish_reason: FinishReason
    log_probs: tuple[float, ...]  # one per id


@dataclass
class _Running:
    """One row while it runs."""

    index: int  # among the requests
    text_ids: tuple[int, ...]
    new_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    answer: Answer | None = None


def generate(
    base: Base,
    requests: Sequence[Request],
    sampling: SamplingConfig | None = None,
    *,
    forward: Forward | None = None,
) -> list[Answer]:
    """One answer per request, in order.

    Raises LengthError where a prompt, its text and the new tokens exceed the base's positions, PromptError where a
    prompt has another width than the base, and BaseModelError where the base computes NaN.
    """
    sampling = sampling or SamplingConfig()
    for request in requests:
        _check(base, request, sampling)
    rows = [_Running(index, request.ids) for index, request in enumerate(requests)]
    if rows:
        _run(base, forward or forward_of(base), requests, rows, Sampler(base, sampling, len(rows)))
    return [row.answer for row in rows if row.answer is not None]


@torch.inference_mode()
def _run(base: Base, forward: Forward, requests: Sequence[Request], running: list[_Running], sampler: Sampler) -> None:
    prompts, numbers = _distinct_prompts(requests)
    batch = concatenate(base, [Row(r.ids, n) for r, n in zip(requests, numbers, strict=True)], prompts, "right")
    cache = new_cache()
    while True:
        hidden = forward.hidden_states(batch.embeds_BSH, batch.mask_BS, batch.positions_BS, cache)
        logits_BV = forward.logits(hidden[:, -1]).float()
        next_ids = sampler.choose(logits_BV, [row.index for row in running], [_all_ids(row) for row in running])
        _take(base, running, next_ids, logits_BV, sampler)
        staying = [position for position, row in enumerate(running) if row.answer is None]
        if not staying:
            return
        if len(staying) < len(running):
            kept = torch.tensor(staying, device=base.device)
            cache.batch_select_indices(kept)
            batch, next_ids = keep(batch, kept), next_ids[kept]
            running = [running[position] for position in staying]
        batch = append(base, batch, next_ids)


def _distinct_prompts(requests: Sequence[Request]) -> tuple[list[Tensor], list[int | None]]:
    distinct = {id(request.prompt): request.prompt for request in requests if request.prompt is not None}
    numbers = {key: number for number, key in enumerate(distinct)}
    return [p.tensor for p in distinct.values()], [numbers.get(id(request.prompt)) for request in requests]


def _all_ids(row: _Running) -> list[int]:
    return [*row.text_ids, *row.new_ids]


def _take(base: Base, running: list[_Running], next_ids: Tensor, logits_BV: Tensor, sampler: Sampler) -> None:
    log_probs = torch.log_softmax(logits_BV, dim=-1).gather(1, next_ids[:, None])[:, 0].tolist()
    for row, token, log_prob in zip(running, next_ids.tolist(), log_probs, strict=True):
        if math.isnan(log_prob):
            raise BaseModelError(f"base {base.name!r} computes NaN in {base.dtype}; load it in float32 or bfloat16")
        if token in base.stop_ids:
            row.answer = _answer(base, row, "stop")
            continue
        row.new_ids.append(token)
        row.log_probs.append(log_prob)
        row.answer = _ended(base, row, sampler.config)


def _ended(base: Base, row: _Running, sampling: SamplingConfig) -> Answer | None:
    text = base.decode_after(row.text_ids, row.new_ids) if sampling.stop else ""
    found = [text.index(stop) for stop in sampling.stop if stop in text]
    if found:
        return Answer(tuple(row.new_ids), text[: min(found)], "stop", tuple(row.log_probs))
    return _answer(base, row, "length") if len(row.new_ids) == sampling.max_new_tokens else None


def _answer(base: Base, row: _Running, reason: FinishReason) -> Answer:
    text = base.decode_after(row.text_ids, row.new_ids)
    return Answer(tuple(row.new_ids), text, reason, tuple(row.log_probs))


def _check(base: Base, request: Request, sampling: SamplingConfig) -> None:
    num_virtual = request.prompt.num_virtual_tokens if request.prompt is not None else 0
    if request.prompt is not None and request.prompt.hidden_size != base.hidden_size:
        raise PromptError(
            f"the soft prompt has width {request.prompt.hidden_size}; base {base.name!r} takes {base.hidden_size}"
        )
    wanted = num_virtual + len(request.ids) + sampling.max_new_tokens
    if wanted > base.max_length:
        raise LengthError(
            f"{num_virtual} virtual tokens, {len(request.ids)} of the input and {sampling.max_new_tokens} new ones are "
            f"{wanted}, more than the {base.max_length} positions of base {base.name!r}; shorten the input or "
            "lower --max-new-tokens"
        )
