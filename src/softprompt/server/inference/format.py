"""How the two endpoints write answers: whole, and as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from softprompt.engine import Answer, PromptLogprobs, TokenLogProb, Tokens
from softprompt.server.inference.generation import Generation, GenerationEvent
from softprompt.server.inference.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    Json,
    LogprobsFormatter,
    TokenTexts,
    concatenated,
    prompt_logprobs,
)

_COMPLETION_TOKENS_DETAILS: Json = {
    "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
}  # fmt: skip


class AnswerFormat(ABC):
    """Writes the answers of one generation; the two endpoints differ in what a subclass gives."""

    id_prefix: str
    kind: str  # `object` of a whole answer
    chunk_kind: str  # `object` of a chunk

    def __init__(self, generation: Generation, texts: TokenTexts) -> None:
        self._generation = generation
        self._output = generation.output
        self._texts = texts
        self._created = int(time.time())
        self._id = f"{self.id_prefix}-{secrets.token_hex(16)}"
        self._formatters: dict[int, LogprobsFormatter] = {}  # by choice
        self._prompt_logprobs: dict[int, Json] = {}  # by request
        self._opened: set[int] = set()  # choices whose first chunk was written

    @abstractmethod
    def message(self, index: int, text: str) -> Json:
        """The text of a whole choice."""

    @abstractmethod
    def delta(self, text: str) -> Json:
        """The next text of a choice in a stream."""

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """What a stream has of a choice before its first text, if anything."""

    @abstractmethod
    def logprobs_formatter(self, index: int) -> LogprobsFormatter:
        """For the tokens of one choice."""

    def index(self, number: int, choice: int) -> int:
        """The index, among all choices, of a request's choice."""
        return number * self._generation.num_choices + choice

    def answer(self, choices: Sequence[Json]) -> Json:
        """The body of a whole answer."""
        return {**self._head(self.kind), "choices": list(choices), "usage": self.usage()}

    def choice(self, index: int, answer: Answer, log_probs: Sequence[TokenLogProb]) -> Json:
        """One whole choice."""
        logprobs, prompt = self._logprobs(index, log_probs), self._prompt_logprobs_of(index)
        return {**self.message(index, answer.text), "index": index,
                "logprobs": logprobs if logprobs is None or prompt is None else concatenated(prompt, logprobs),
                **self._end(answer)}  # fmt: skip

    def chunks(self, number: int, event: GenerationEvent) -> list[Json]:
        """The chunks of a stream for an event of request `number`; maybe none."""
        if isinstance(event, Tokens):
            index = self.index(number, event.choice)
            return self._token_chunks(index, event) + ([] if event.end is None else self._end_chunks(index, event.end))
        if isinstance(event, PromptLogprobs):
            self.add_prompt_logprobs(number, event)
            indices = range(self.index(number, 0), self.index(number + 1, 0))
            return [chunk for index in indices for chunk in self._opening_chunks(index)]
        return []  # the end of each choice came with its last tokens

    def last_chunks(self) -> list[Json]:
        """The stream's last chunk, if usage was asked for."""
        if not self._output.has_usage:
            return []
        return [{**self._head(self.chunk_kind), "choices": [], "usage": self.usage()}]

    def add_prompt_logprobs(self, number: int, event: PromptLogprobs) -> None:
        """Keep the log-probabilities of a request's text, which stand before those of each of its choices."""
        assert self._output.echoes is not None, "nobody asked for them"
        ids, text = self._generation.requests[number].ids, self._output.echoes[number]
        self._prompt_logprobs[number] = prompt_logprobs(self._texts, ids, text, event.log_probs)

    def usage(self) -> Json:
        """Tokens so far. Virtual tokens are counted apart and in no total."""
        generation = self._generation
        num_prompt, num_new = generation.num_prompt_tokens, generation.num_new_tokens
        details = {"cached_tokens": generation.num_cached_tokens, "virtual_tokens": generation.num_virtual_tokens}
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new,
                "prompt_tokens_details": details,
                "completion_tokens_details": _COMPLETION_TOKENS_DETAILS}  # fmt: skip

    def _token_chunks(self, index: int, event: Tokens) -> list[Json]:
        has_more = self._output.has_logprobs or self._output.has_continuous_usage
        if not event.text and not (event.num_generated and has_more):
            return []
        choice = {"index": index, **self.delta(event.text), "finish_reason": None, "stop_reason": None,
                  "logprobs": self._logprobs(index, event.generated_log_probs)}  # fmt: skip
        return [*self._opening_chunks(index), self._chunk(choice)]

    def _end_chunks(self, index: int, answer: Answer) -> list[Json]:
        choice = {"index": index, **self.delta(""), "logprobs": None, **self._end(answer)}
        return [*self._opening_chunks(index), self._chunk(choice)]

    def _opening_chunks(self, index: int) -> list[Json]:
        if index in self._opened:
            return []
        self._opened.add(index)
        opening = self.opening(index)
        rest = {"logprobs": self._prompt_logprobs_of(index), "finish_reason": None, "stop_reason": None}
        return [] if opening is None else [self._chunk({"index": index, **opening, **rest})]

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._generation.model.id,
                "system_fingerprint": self._generation.fingerprint}  # fmt: skip

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        if self._output.has_usage:
            chunk["usage"] = self.usage() if self._output.has_continuous_usage else None
        return chunk

    def _prompt_logprobs_of(self, index: int) -> Json | None:
        return self._prompt_logprobs.get(index // self._generation.num_choices)

    def _logprobs(self, index: int, log_probs: Sequence[TokenLogProb]) -> Json | None:
        if not self._output.has_logprobs:
            return None
        if index not in self._formatters:
            self._formatters[index] = self.logprobs_formatter(index)
        return self._formatters[index](log_probs)

    def _end(self, answer: Answer) -> Json:
        stopped_by = None if answer.stopped_by in self._output.stop_ids else answer.stopped_by
        return {"finish_reason": answer.finish_reason, "stop_reason": stopped_by}


class CompletionFormat(AnswerFormat):
    """/v1/completions; with `echo` the prompt stands before each answer."""

    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def message(self, index: int, text: str) -> Json:
        return {"text": self._echo(index) + text}

    def delta(self, text: str) -> Json:
        return {"text": text}

    def opening(self, index: int) -> Json | None:
        return None if self._output.echoes is None else {"text": self._echo(index)}

    def logprobs_formatter(self, index: int) -> LogprobsFormatter:
        return CompletionLogprobs(self._texts, len(self._echo(index)))

    def _echo(self, index: int) -> str:
        echoes = self._output.echoes
        return "" if echoes is None else echoes[index // self._generation.num_choices]


class ChatFormat(AnswerFormat):
    """/v1/chat/completions: each choice is a message of the assistant."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def message(self, index: int, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def opening(self, index: int) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs_formatter(self, index: int) -> LogprobsFormatter:
        return ChatLogprobs(self._texts)
