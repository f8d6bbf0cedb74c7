"""A sequence is one answer that is being generated, a request's state owns one sequence per choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from softprompt.engine.detokenizer import Detokenizer
from softprompt.engine.kv_cache import Slot
from softprompt.engine.logits_processors import SamplingState
from softprompt.engine.prefix_cache import Key, Prefix
from softprompt.engine.request import DEFAULT_SAMPLING, Answer, FinishReason, Request, TokenLogProb, Tokens
from softprompt.families import ModelCache


@dataclass(eq=False)
class Sequence:
    """One answer from its request's admission to its end. Its positions are [soft prompt, text, answer so far].

    Of an encoder-decoder they are the decoder's, [its soft prompt, start, answer so far]; the encoder reads the text.
    """

    owner: RequestState
    choice: int
    runner: ModelRunner
    sampling: SamplingState
    detokenizer: Detokenizer
    ids: list[int]  # of the text and the answer; of an encoder-decoder, what the decoder reads
    num_given: int  # of these, how many are not the answer's
    num_virtual: int  # virtual tokens in front of them
    num_to_encode: int = 0  # positions of an encoder that run whole in its next step
    encoded: Tensor | None = None  # [S, D], the encoder's states, while it runs by itself
    cross_slot: Slot | None = None  # in the cross-attention's KV cache, while it runs batched
    prefix_keys: list[tuple[int, Key]] = field(default_factory=list)  # lengths and keys of prefixes it may share
    computed: int = 0  # positions whose keys and values are in memory
    num_cached: int | None = None  # positions taken from the prefix cache when it first started
    slot: Slot | None = None  # in the KV cache, while it runs batched
    model_cache: ModelCache | None = None  # while it runs by itself
    prefix: Prefix | None = None  # pinned: the one that it started from
    pending_prefixes: list[tuple[int, Key]] = field(default_factory=list)  # prefixes it is computing for others
    log_probs: list[TokenLogProb] = field(default_factory=list)
    prompt_log_probs: list[TokenLogProb | None] | None = None  # of the text so far; None: not wanted, or sent
    answer: Answer | None = None  # when it has ended

    @property
    def request(self) -> Request:
        return self.owner.request

    @property
    def client(self) -> str | None:
        return self.owner.request.client

    @property
    def order(self) -> tuple[int, int, int]:
        """Of its client's sequences the lowest is next."""
        return self.owner.request.priority, self.owner.id, self.choice

    @property
    def length(self) -> int:
        """Positions it has so far."""
        return self.num_virtual + len(self.ids)

    @property
    def max_length(self) -> int:
        """Positions it may come to have."""
        return self.num_virtual + self.num_given + (self.request.sampling or DEFAULT_SAMPLING).max_new_tokens

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.num_given :]

    @property
    def remaining(self) -> int:
        """Positions to run before its next token can be sampled."""
        return self.length - self.computed

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is left to run."""
        return self.remaining == 1 and len(self.ids) > self.num_given

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its text are still to be computed."""
        return self.prompt_log_probs is not None and len(self.prompt_log_probs) < len(self.request.ids)

    @property
    def waits_for_prompt_logprobs(self) -> bool:
        """Whether the request's first sequence has yet to compute those of their text."""
        return self.choice > 0 and self.owner.sequences[0].prompt_log_probs is not None

    @property
    def max_reusable_tokens(self) -> int:
        """Positions that it may take from the prefix cache; those that prompt log-probabilities need it runs itself."""
        return self._first_with_logprob if self.wants_prompt_logprobs else self.length - 1

    def with_prompt_logprobs(self, count: int) -> slice:
        """Which of the next `count` positions predict tokens of its text whose log-probabilities are wanted."""
        last = self.num_virtual + len(self.request.ids) - 1
        return slice(self._first_with_logprob - self.computed, max(0, min(count, last - self.computed)))

    def append_token(
        self, token: int, log_prob: float | None, alternatives: tuple[tuple[int, float], ...] = ()
    ) -> Tokens:
        """Append a sampled token, or end the answer with it; the event for it."""
        if self.request.is_text_only:
            return self._end("length", (), "", None)
        reported = None if log_prob is None else TokenLogProb(token, log_prob, alternatives)
        self.sampling.append(token)
        if token in self.sampling.ending_ids:
            return self._end("stop", (), self.detokenizer.finish(), token, reported)
        self.ids.append(token)
        text = self.detokenizer.append(token)
        if reported is not None:
            self.log_probs.append(reported)
        if self.detokenizer.stopped_by is not None:
            return self._end("stop", (token,), text, self.detokenizer.stopped_by)
        if self.sampling.is_complete:
            return self._end("stop", (token,), text + self.detokenizer.finish(), None)
        if self.length == self.max_length:
            return self._end("length", (token,), text + self.detokenizer.finish(), None)
        return self._tokens((token,), text)

    @property
    def _first_with_logprob(self) -> int:
        """The position before the text's first token whose log-probability is wanted and not there yet."""
        assert self.prompt_log_probs is not None
        return self.num_virtual + len(self.prompt_log_probs) - 1

    def _end(
        self,
        reason: FinishReason,
        ids: tuple[int, ...],
        text: str,
        stopped_by: str | int | None,
        end_log_prob: TokenLogProb | None = None,
    ) -> Tokens:
        log_probs = tuple(token.log_prob for token in self.log_probs)
        text_so_far = self.detokenizer.text
        self.answer = Answer(tuple(self.new_ids), text_so_far, reason, log_probs, stopped_by, end_log_prob)
        return self._tokens(ids, text)

    def _tokens(self, ids: tuple[int, ...], text: str) -> Tokens:
        log_probs = (self.log_probs[-1],) if ids and self.log_probs else ()
        return Tokens(self.owner.id, self.choice, ids, text, log_probs, self.answer)


@dataclass(eq=False)
class RequestState:
    """One request from its admission to its terminal event."""

    id: int  # rises with every admission
    request: Request
    sequences: list[Sequence] = field(default_factory=list)


class RunnerOutput(NamedTuple):
    """Hidden states of one step."""

    last: Tensor  # [number of sequences, D]: of the last position of each
    prompt_states: list[tuple[Sequence, Tensor]]  # [N, D]: of `Sequence.with_prompt_logprobs`, where those are wanted


class ModelRunner(Protocol):
    """How sequences run: batched over a KV cache, or one at a time through plain transformers."""

    supports_chunked_prefill: bool  # whether a text may be read over several steps

    def can_ever_fit(self, request: Request) -> bool:
        """Whether a request's answer fits into the memory at all. Any thread may ask."""
        ...

    def should_wait_for_prefix(self, sequence: Sequence) -> bool:
        """Whether another sequence is just computing a prefix that this one could start from."""
        ...

    def start(self, sequence: Sequence) -> bool:
        """Allocate memory for the positions that a sequence has and one more; False where there is none now."""
        ...

    def grow(self, sequence: Sequence) -> bool:
        """Allocate memory for one more position; False where there is none now."""
        ...

    def stop(self, sequence: Sequence) -> None:
        """Free all that `start` and `grow` allocated."""
        ...

    def run(self, plan: list[tuple[Sequence, int]]) -> RunnerOutput:
        """Run so many positions of each sequence."""
        ...

    def check_integrity(self, running: list[Sequence]) -> None:
        """What is in memory is that of these sequences, which are all that run here. Raises AssertionError."""
        ...
