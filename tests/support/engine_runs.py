"""Engines driven to their end: every event checked as it comes, and answers against the slow truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from softprompt.base import Base
from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import (
    Answer,
    Engine,
    Event,
    Finished,
    PromptLogprobs,
    Request,
    Terminal,
    TokenLogProb,
    Tokens,
)
from softprompt.engine.kv_cache import CapacityBucket, Slot
from softprompt.engine.model_runner import bytes_per_position
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt
from support.slow_truth import plain_logits
from support.tiny_bases import random_prompt

NEAR_TIE = 1e-4  # nats between two candidates, of which either may come


class Ledger:
    """All events of one engine: each request ends once, and its pieces are the answer."""

    def __init__(self) -> None:
        self.ends: dict[int, Terminal] = {}
        self.tokens: dict[int, list[Tokens]] = defaultdict(list)  # of requests that have not ended
        self.texts: dict[int, tuple[TokenLogProb | None, ...]] = {}  # their log-probabilities
        self.num_tokens = 0

    def record(self, events: Sequence[Event]) -> None:
        for event in events:
            assert event.request not in self.ends, "an event behind the end"
            if isinstance(event, Tokens):
                self.tokens[event.request].append(event)
                self.num_tokens += len(event.ids)
                continue
            if isinstance(event, PromptLogprobs):
                assert event.request not in self.texts and not self.tokens[event.request], "they came twice, or late"
                self.texts[event.request] = event.log_probs
                continue
            self.ends[event.request] = event
            pieces = self.tokens.pop(event.request, [])
            if isinstance(event, Finished):
                for choice, answer in enumerate(event.answers):
                    _check_pieces([tokens for tokens in pieces if tokens.choice == choice], answer)

    def answers(self, request: int) -> tuple[Answer, ...]:
        end = self.ends[request]
        assert isinstance(end, Finished), end
        return end.answers


def _check_pieces(pieces: Sequence[Tokens], answer: Answer) -> None:
    assert tuple(token for tokens in pieces for token in tokens.ids) == answer.ids
    assert "".join(tokens.text for tokens in pieces) == answer.text
    assert [tokens.end for tokens in pieces] == [None] * (len(pieces) - 1) + [answer]
    assert tuple(each.log_prob for tokens in pieces for each in tokens.log_probs) == answer.log_probs
    assert all(each.id == token for tokens in pieces for each, token in zip(tokens.log_probs, tokens.ids, strict=False))


def run_out(engine: Engine, ledger: Ledger | None = None, on_step: Callable[[Engine], None] | None = None) -> Ledger:
    """Step until every request has ended; the engine must then be as empty as a new one."""
    ledger = ledger or Ledger()
    while engine.has_work:
        ledger.record(engine.step())
        engine.check_integrity()
        if on_step is not None:
            on_step(engine)
    assert_empty(engine)
    return ledger


def assert_empty(engine: Engine) -> None:
    """No request has left anything behind."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_bytes_in_use) == (0, 0, 0)
    assert not engine.has_work
    engine.check_integrity()


def answers(
    base: Base, requests: Sequence[Request], config: EngineConfig | None = None, engine: Engine | None = None
) -> list[Answer]:
    """The first answer of each request, all added at once."""
    engine = engine or Engine(base, config)
    ids = [engine.add(request) for request in requests]
    ledger = run_out(engine)
    return [ledger.answers(number)[0] for number in ids]


def asked(
    base: Base, ids: tuple[int, ...], prompt: int | SoftPrompt | None = None, num_new: int = 12, **settings: object
) -> Request:
    """A request that reports its log-probabilities; `prompt` is the length of a random one, or one."""
    found = SoftPrompt(random_prompt(base, prompt, seed=prompt)) if isinstance(prompt, int) else prompt
    return Request(ids, found, SamplingConfig(max_new_tokens=num_new, **settings), num_log_probs=0)


def kv_bytes(base: Base, num_positions: int) -> int:
    """Bytes of keys and values of so many positions."""
    return num_positions * bytes_per_position(base, forward_of(base))


@torch.no_grad()
def assert_true(base: Base, request: Request, answer: Answer) -> None:
    """A greedy answer is the slow truth's: each token the likeliest of one plain forward over the whole row, up to near
    ties, its log-probability equal to 1e-5, and the end where it belongs."""
    prompt = None if request.prompt is None else request.prompt.tensor
    num_virtual = 0 if prompt is None else len(prompt)
    logits = plain_logits(base, request.ids + answer.ids, prompt).float()
    log_probs = torch.log_softmax(logits[num_virtual + len(request.ids) - 1 :], dim=-1)
    assert len(answer.log_probs) == len(answer.ids)
    for step, (token, log_prob) in enumerate(zip(answer.ids, answer.log_probs, strict=True)):
        assert float(log_probs[step].max() - log_probs[step, token]) < NEAR_TIE, step
        assert log_prob == pytest.approx(float(log_probs[step, token]), abs=1e-5), step
    if answer.finish_reason == "length":
        assert len(answer.ids) == request.sampling.max_new_tokens
    else:
        assert float(log_probs[-1].max() - log_probs[-1, list(base.stop_ids)].max()) < NEAR_TIE
        assert answer.end_log_prob is not None and answer.end_log_prob.id == answer.stopped_by
        assert answer.end_log_prob.log_prob == pytest.approx(float(log_probs[-1, answer.stopped_by]), abs=1e-5)


@torch.no_grad()
def true_log_probs(base: Base, request: Request, prompt: Tensor | None = None) -> list[Tensor | None]:
    """Of each token of the text [V], None where nothing stands before it; `prompt` in place of the request's own."""
    tensor = prompt if prompt is not None else None if request.prompt is None else request.prompt.tensor
    num_virtual = 0 if tensor is None else len(tensor)
    rows = torch.log_softmax(plain_logits(base, request.ids, tensor).float(), dim=-1)[max(0, num_virtual - 1) : -1]
    return [*([] if num_virtual else [None]), *rows]


def assert_text_true(
    base: Base, request: Request, found: Sequence[TokenLogProb | None], prompt: Tensor | None = None
) -> None:
    """Prompt log-probabilities are the slow truth's: one plain forward over the whole row, to 1e-5."""
    truth = true_log_probs(base, request, prompt)
    assert len(found) == len(truth) == len(request.ids)
    for pos, (token, ours, row) in enumerate(zip(request.ids, found, truth, strict=True)):
        assert (ours is None) == (row is None), pos
        if row is None:
            continue
        assert ours.id == token and ours.log_prob == pytest.approx(float(row[token]), abs=1e-5), pos
        best = row.topk(request.num_text_log_probs).values.tolist()
        assert [nats for _, nats in ours.alternatives] == pytest.approx(best, abs=1e-5), pos
        assert all(nats == pytest.approx(float(row[i]), abs=1e-5) for i, nats in ours.alternatives), pos


def assert_alike(ours: Answer, theirs: Answer) -> None:
    """The same tokens and log-probabilities. Of two answers that draw, or that `assert_true` cannot follow."""
    assert ours.ids == theirs.ids
    assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)
    assert (ours.text, ours.finish_reason, ours.stopped_by) == (theirs.text, theirs.finish_reason, theirs.stopped_by)


def alone(base: Base, request: Request) -> Answer:
    """What a request answers by itself, in an engine of its own."""
    return answers(base, [replace(request, client=None, priority=0, timeout_s=None)])[0]


def samplings() -> st.SearchStrategy[SamplingConfig]:
    """Short and long answers under every setting that needs no other package."""
    return st.builds(
        lambda most, least, **others: SamplingConfig(max_new_tokens=most, min_new_tokens=min(most, least), **others),
        most=st.sampled_from([1, 5, 30, 50]),
        least=st.sampled_from([0, 0, 3]),
        temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 0, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
        stop=st.sampled_from([(), (), ("w5",), ("w9 w1", "w3")]),
        stop_ids=st.sampled_from([(), (), (7, 8)]),
        ignore_eos=st.sampled_from([True, True, False]),
        logit_bias=st.sampled_from([(), (), ((7, 3.0), (9, -5.0))]),
        seed=st.integers(0, 3),
    )


def free_without_copying(bucket: CapacityBucket, slot: Slot) -> None:
    """`CapacityBucket.free` with a fault: the row that moves does not bring its keys and values."""
    last, freed = bucket.slots.pop(), len(bucket.slots)
    if last is not slot:
        bucket.slots[slot.row], last.row = last, slot.row
    bucket.buffer.clear(freed)
