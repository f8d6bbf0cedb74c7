"""How an endpoint writes answers: whole, and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt.engine import Answer, PromptLogprobs, TokenLogProb, Tokens
from softprompt.server.inference.call import Call
from softprompt.server.inference.reports import Echo, Report, Reporter, joined

Json = dict[str, Any]

_MADE_DETAILS: Json = {
    "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What differs between the endpoints. Choice i of request r has the index r * n + i."""

    prefix: str  # of the answer's id
    kind: str  # `object` of a whole answer
    chunk_kind: str  # `object` of a piece
    whole: Callable[[int, str], Json]  # index and text to a choice's own keys
    piece: Callable[[int, str], Json]
    opening: Callable[[int], Json | None]  # the same of what a stream sends before a choice's first token
    reporter: Callable[[int], Reporter]  # of one choice
    echo: Echo | None = None  # a request's number, and what is told of its text


@dataclass(kw_only=True)
class Writer:
    """Writes one call's answers."""

    call: Call
    shape: Shape
    fingerprint: str  # of what answers
    stop_ids: frozenset[int]  # ends of text that the client has not named itself: they are no `stop_reason`
    has_reports: bool  # log-probabilities are wanted
    tells_usage: bool = False  # the stream's last event has the usage
    tells_usage_always: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)
    _reporters: dict[int, Reporter] = field(init=False, default_factory=dict)
    _echoes: dict[int, Report] = field(init=False, default_factory=dict)  # of each request whose text was told
    _opened: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.id = f"{self.shape.prefix}-{secrets.token_hex(16)}"

    def index(self, number: int, choice: int) -> int:
        """Of a request's choice in the whole answer."""
        return number * self.call.num_choices + choice

    def answer(self, choices: Sequence[Json]) -> Json:
        """The body of a whole answer."""
        return {**self._head(self.shape.kind), "choices": list(choices), "usage": self.usage()}

    def choice(self, index: int, answer: Answer, log_probs: Sequence[TokenLogProb]) -> Json:
        """One whole choice."""
        report, echo = self._report(index, log_probs), self._echo(index)
        return {**self.shape.whole(index, answer.text), "index": index,
                "logprobs": report if report is None or echo is None else joined(echo, report),
                **self._end(answer)}  # fmt: skip

    def read(self, number: int, event: PromptLogprobs) -> None:
        """Note what is told of a request's text: it stands before each of its choices."""
        assert self.shape.echo is not None, "nobody asked for it"
        self._echoes[number] = self.shape.echo(number, event.log_probs)

    def openings(self, number: int) -> list[Json]:
        """The stream's first events of a request's choices."""
        indices = range(self.index(number, 0), self.index(number + 1, 0))
        return [chunk for index in indices for chunk in self._opening(index)]

    def tokens(self, index: int, event: Tokens) -> list[Json]:
        """The stream's events for new tokens: none where there is nothing to tell."""
        if not event.text and not (event.num_generated and (self.has_reports or self.tells_usage_always)):
            return []
        choice = {"index": index, **self.shape.piece(index, event.text), "finish_reason": None, "stop_reason": None,
                  "logprobs": self._report(index, event.generated_log_probs)}  # fmt: skip
        return [*self._opening(index), self._chunk(choice)]

    def end(self, index: int, answer: Answer) -> list[Json]:
        """The stream's last event of a choice."""
        choice = {"index": index, **self.shape.piece(index, ""), "logprobs": None, **self._end(answer)}
        return [*self._opening(index), self._chunk(choice)]

    def closing(self) -> list[Json]:
        """The stream's last event, where usage was asked for."""
        if not self.tells_usage:
            return []
        return [{**self._head(self.shape.chunk_kind), "choices": [], "usage": self.usage()}]

    def usage(self) -> Json:
        """Tokens so far. Those of the soft prompt are counted apart and in no total."""
        read, made = self.call.num_prompt_tokens, self.call.num_new_tokens
        details = {"cached_tokens": self.call.num_cached_tokens, "virtual_tokens": self.call.num_virtual_tokens}
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
                "prompt_tokens_details": details, "completion_tokens_details": _MADE_DETAILS}  # fmt: skip

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model.id,
                "system_fingerprint": self.fingerprint}  # fmt: skip

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._head(self.shape.chunk_kind), "choices": [choice]}
        if self.tells_usage:
            chunk["usage"] = self.usage() if self.tells_usage_always else None
        return chunk

    def _opening(self, index: int) -> list[Json]:
        if index in self._opened:
            return []
        self._opened.add(index)
        opening = self.shape.opening(index)
        rest = {"logprobs": self._echo(index), "finish_reason": None, "stop_reason": None}
        return [] if opening is None else [self._chunk({"index": index, **opening, **rest})]

    def _echo(self, index: int) -> Report | None:
        return self._echoes.get(index // self.call.num_choices)

    def _report(self, index: int, log_probs: Sequence[TokenLogProb]) -> Report | None:
        if not self.has_reports:
            return None
        if index not in self._reporters:
            self._reporters[index] = self.shape.reporter(index)
        return self._reporters[index](log_probs)

    def _end(self, answer: Answer) -> Json:
        stopped_by = None if answer.stopped_by in self.stop_ids else answer.stopped_by
        return {"finish_reason": answer.finish_reason, "stop_reason": stopped_by}
