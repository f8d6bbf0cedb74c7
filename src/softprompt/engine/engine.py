"""A generation engine: many requests, each with its own soft prompt or none, in one running batch over one frozen base.

`add` admits a request, `step` does one bounded piece of work, and every admitted id ends in exactly one terminal event.
One thread owns an engine; `softprompt.engine.AsyncEngine` is for all others. Knows nothing of HTTP or of the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import torch

from softprompt.base import Base
from softprompt.config import EngineConfig
from softprompt.engine.detokenizer import Detokenizer
from softprompt.engine.kv_cache import is_out_of_memory
from softprompt.engine.model_runner import RunnerKind, Runners, make_runners, with_weights
from softprompt.engine.pooling import Pooler, PoolingRequest, check_pooling
from softprompt.engine.prefix_cache import prefix_keys, prompt_key
from softprompt.engine.prompt_logprobs import extend_prompt_logprobs, new_prompt_logprobs
from softprompt.engine.request import (
    DEFAULT_SAMPLING,
    Aborted,
    AbortReason,
    Event,
    Failed,
    Finished,
    Pooled,
    PromptLogprobs,
    Request,
    check_request,
    nan_message,
)
from softprompt.engine.sampler import SampledToken, Sampler
from softprompt.engine.scheduler import Plan, Scheduler
from softprompt.engine.seq2seq_runner import make_seq2seq_runners
from softprompt.engine.sequence import RequestState, Sequence
from softprompt.engine.stats import Counts, EngineStats
from softprompt.errors import MemoryLimitError, QueueFullError
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt


class Engine:
    """Continuous batching: requests join and leave at any step."""

    def __init__(
        self,
        base: Base,
        config: EngineConfig | None = None,
        *,
        forward: Forward | None = None,
        arrange: bool = True,
        runner: RunnerKind = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`arrange`: prepare for many requests: keep the weights a second time, as this processor reads them fastest,
        where it gains, and allocate the memory for keys and values of short answers now.

        `runner`: "auto" runs answers as fast as the base allows, "torch" without the compiled attention, "eager" one
        at a time through transformers' own forward.
        """
        self.base = base
        self.config = config or EngineConfig()
        loaded = forward or forward_of(base)
        self.forward = with_weights(loaded, base, self.config.weights)
        make = make_seq2seq_runners if base.kind == "seq2seq" else make_runners
        self.runners: Runners = make(base, self.forward, self.config, arrange, runner)
        limits = self.runners.limits
        self.scheduler = Scheduler(limits.max_sequences, limits.max_step_tokens, limits.num_prefill_steps)
        self.pooler = Pooler(base, loaded)
        self.counts = Counts()
        self._sampler = Sampler(base)
        self._clock = clock
        self._alive: dict[int, RequestState] = {}
        self._deadlines: dict[int, float] = {}
        self._aborted: dict[int, AbortReason] = {}
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._alive) or len(self.pooler) > 0

    @property
    def notes(self) -> tuple[str, ...]:
        """How this base runs, and why not faster, for people."""
        return self.runners.notes

    def check(self, request: Request) -> None:
        """Raise what `add` would raise for this request, but for guides and a full queue. Any thread may call it."""
        check_request(self.base, request)
        if not self.runners.select(request).can_ever_fit(request):
            raise MemoryLimitError(
                f"{request.max_length} positions are more than the engine's memory for keys and values holds; raise "
                "kv_bytes or ask for fewer new tokens",
                param="max_tokens",
            )

    def prepare(self, request: Request) -> None:
        """Compile the request's guide, if it has one, ahead of `add`. Any thread may call it.

        Raises ConfigError where the guide cannot be followed, and MissingDependencyError without llguidance.
        """
        if request.sampling is not None:
            self._sampler.prepare(request.sampling, request.cache_salt)

    def add(self, request: Request) -> int:
        """Admit a request; its id.

        Raises LengthError, PromptError, DataError or ConfigError where it cannot be answered, MemoryLimitError where
        it is longer than the memory for keys and values, and QueueFullError where too many wait.
        """
        self.check(request)
        if self.config.max_waiting is not None and len(self.scheduler.waiting) >= self.config.max_waiting:
            raise QueueFullError(f"{self.config.max_waiting} requests wait already; try again later")
        state = RequestState(self._next_id, request)
        state.sequences = [self._new_sequence(state, choice) for choice in range(request.num_choices)]
        self._alive[state.id] = state
        for sequence in state.sequences:
            self.scheduler.add(sequence)
        return self._admitted(request.timeout_s)

    def check_pooling(self, request: PoolingRequest) -> None:
        """Raise what `add_pooling` would raise, but for a full queue. Any thread may call it."""
        check_pooling(self.base, request)

    def add_pooling(self, request: PoolingRequest) -> int:
        """Admit a pooling request; its id. It ends in Pooled, Aborted or Failed.

        Raises PromptError, DataError, LengthError or ConfigError where it cannot be answered, and QueueFullError where
        too many wait.
        """
        self.check_pooling(request)
        if self.config.max_waiting is not None and len(self.pooler) >= self.config.max_waiting:
            raise QueueFullError(f"{self.config.max_waiting} texts wait already; try again later")
        self.pooler.add(self._next_id, request)
        return self._admitted(request.timeout_s)

    def _admitted(self, timeout_s: float | None) -> int:
        number = self._next_id
        self._next_id += 1
        if timeout_s is not None:
            self._deadlines[number] = self._clock() + timeout_s
        return number

    def abort(self, request: int) -> None:
        """End a request: the next step emits Aborted. Does nothing for one that has ended, or never was."""
        if request in self._alive or request in self.pooler:
            self._aborted.setdefault(request, "asked")

    def pin(self, prompt: SoftPrompt) -> None:
        """Once computed, a soft prompt's keys and values are never evicted for others', until `unpin`.

        Raises MemoryLimitError where pinned ones would take more than half of `prefix_bytes`.
        """
        cache = self.runners.prefix_cache
        if self.base.kind == "seq2seq":
            return  # what its vectors compute depends on the text
        num_bytes = prompt.num_virtual_tokens * self.runners.kv_cache.bytes_per_position
        if self.runners.is_batchable and not cache.reserve(prompt_key(prompt), num_bytes):
            raise MemoryLimitError(
                f"{prompt.num_virtual_tokens} virtual tokens more would take over half of the memory for prefixes "
                f"({cache.budget_bytes:,} bytes); unpin another prompt, or raise prefix_bytes"
            )

    def unpin(self, prompt: SoftPrompt) -> None:
        """Undo `pin`; does nothing for a prompt that is not pinned."""
        self.runners.prefix_cache.release(prompt_key(prompt))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Abort what was asked, plan, run one forward, and sample; then run some rows of pooling requests, if there are
        any. The events of all that."""
        events = self._end_aborted()
        plan = self.scheduler.plan()
        self.counts.num_steps += 1 if plan or len(self.pooler) else 0
        events += self._run(plan) if plan else self._fail_without_memory()
        if len(self.pooler):
            events += self._pool(self.scheduler.max_step_tokens if plan else self.scheduler.max_idle_tokens)
        return events

    def _fail_without_memory(self) -> list[Event]:
        if self._alive and not self.scheduler.running:  # the machine has less memory than the engine was allowed
            oldest = min(self.scheduler.waiting, key=lambda sequence: sequence.owner.id)
            return self._fail({oldest.owner}, "out of memory: there is none for its keys and values")
        return []

    def _pool(self, max_positions: int) -> list[Event]:
        """The ends of pooling requests."""
        events = self.pooler.step(max_positions)
        for event in events:
            self._deadlines.pop(event.request, None)
            self.counts.num_finished += isinstance(event, Pooled)
            self.counts.num_failed += isinstance(event, Failed)
        return events

    def stats(self) -> EngineStats:
        return self.counts.with_state(self.scheduler, self.runners, len(self.pooler))

    @torch.inference_mode()
    def close(self) -> None:
        """Drop all requests without emitting events."""
        for request in [*self._alive, *self.pooler]:
            self._drop(request)
        self._aborted.clear()

    def check_integrity(self) -> None:
        """Every sequence waits or runs, memory and pins are those of running ones, and without requests nothing is
        left. Raises AssertionError."""
        alive = [each for state in self._alive.values() for each in state.sequences if each.answer is None]
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(alive) == len(running) + len(waiting) and set(alive) == {*running, *waiting}
        known = {*self._alive, *self.pooler}
        assert self._deadlines.keys() <= known and self._aborted.keys() <= known
        self.pooler.check_integrity()
        self.runners.check_integrity(running)
        if not self._alive:
            self.scheduler.waiting.assert_empty()

    def _new_sequence(self, owner: RequestState, choice: int) -> Sequence:
        request = owner.request
        sampling = request.sampling or DEFAULT_SAMPLING
        runner = self.runners.select(request)
        is_batched = runner is self.runners.batched
        is_repeated = request.num_choices > 1
        keys = prefix_keys(request.prompt, request.ids, is_repeated, request.cache_salt) if is_batched else []
        text_ids = ids = request.ids
        num_virtual, num_to_encode = request.num_virtual, 0
        if self.base.kind == "seq2seq":
            text_ids, ids, keys = (), self.base.decoder_start_ids, []
            num_virtual, num_to_encode = request.num_virtual_of_decoder, request.num_encoded
        return Sequence(
            owner=owner,
            choice=choice,
            runner=runner,
            sampling=self._sampler.new_state(sampling, ids, choice, request.cache_salt),
            detokenizer=Detokenizer(self.base, text_ids, sampling.stop, sampling.min_new_tokens),
            ids=list(ids),
            num_given=len(ids),
            num_virtual=num_virtual,
            num_to_encode=num_to_encode,
            prefix_keys=keys,
            prompt_log_probs=new_prompt_logprobs(request) if choice == 0 else None,
        )

    def _run(self, plan: Plan) -> list[Event]:
        """The step's forward, and one token for every sequence that was run to its end."""
        num_read = [count + sequence.num_to_encode for sequence, count in plan]
        try:
            hidden, prompt_states = self.runners.run(plan)
            has_nan = extend_prompt_logprobs(self.base, self.forward, prompt_states) if prompt_states else []
            is_due = [sequence.remaining == 0 for sequence, _ in plan]
            due = [sequence for sequence, _ in plan if sequence.remaining == 0]
            sampled = self._sample(hidden[torch.tensor(is_due, device=hidden.device)], due) if due else []
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return self._fail({sequence.owner for sequence, _ in plan}, f"out of memory: {error}")
        for (sequence, _), count in zip(plan, num_read, strict=True):
            self.scheduler.waiting.charge(sequence, count, sequence.remaining == 0)
            self.counts.num_read_tokens += count
        return self._fail_for_nan(has_nan) + self._append(due, sampled)

    def _sample(self, hidden: torch.Tensor, sequences: list[Sequence]) -> list[SampledToken | None]:
        num_log_probs = [sequence.request.num_log_probs for sequence in sequences]
        states = [sequence.sampling for sequence in sequences]
        return self._sampler.sample(self.forward.logits(hidden), states, num_log_probs)

    def _append(self, sequences: list[Sequence], sampled: list[SampledToken | None]) -> list[Event]:
        events: list[Event] = []
        for sequence, token in zip(sequences, sampled, strict=True):
            if sequence.owner.id not in self._alive:
                continue  # it failed together with another choice of its request
            if token is None:
                events += self._fail_without_token(sequence)
                continue
            self.counts.num_new_tokens += 1
            if sequence.prompt_log_probs is not None:
                events.append(PromptLogprobs(sequence.owner.id, tuple(sequence.prompt_log_probs)))
                sequence.prompt_log_probs = None
            events.append(sequence.append_token(token.id, token.log_prob, token.alternatives))
            if sequence.answer is not None:
                self.scheduler.remove(sequence)
                events += self._finish(sequence.owner)
        return events

    def _finish(self, state: RequestState) -> list[Event]:
        """The terminal event, if the request's last choice has ended."""
        answers = [sequence.answer for sequence in state.sequences if sequence.answer is not None]
        if len(answers) < len(state.sequences):
            return []
        request = state.request
        num_cached = max(0, (state.sequences[0].num_cached or 0) - request.num_virtual)
        self._forget(state)
        self.counts.num_finished += 1
        return [Finished(state.id, tuple(answers), len(request.ids), request.num_virtual, num_cached)]

    def _fail_without_token(self, sequence: Sequence) -> list[Event]:
        """No token could be sampled: the guide has the reason, or the base computes NaN."""
        problem = sequence.sampling.problem
        if problem is None:
            return self._fail_for_nan([sequence])
        return self._fail({sequence.owner}, problem, is_request_fault=True)

    def _fail_for_nan(self, sequences: SequenceOf[Sequence]) -> list[Event]:
        return self._fail({sequence.owner for sequence in sequences}, nan_message(self.base))

    def _fail(self, owners: Iterable[RequestState], why: str, *, is_request_fault: bool = False) -> list[Event]:
        events: list[Event] = []
        for state in sorted(owners, key=lambda owner: owner.id):
            self._drop(state.id)
            self.counts.num_failed += 1
            events.append(Failed(state.id, why, is_request_fault))
        return events

    def _end_aborted(self) -> list[Event]:
        """Drop requests that were aborted, or whose time is over."""
        now = self._clock() if self._deadlines else 0.0
        for request, deadline in self._deadlines.items():
            if deadline <= now:
                self._aborted.setdefault(request, "deadline")
        events: list[Event] = []
        for request, reason in self._aborted.items():
            self._drop(request)
            self.counts.num_aborted += 1
            events.append(Aborted(request, reason))
        self._aborted.clear()
        return events

    def _drop(self, request: int) -> None:
        if request in self.pooler:
            self.pooler.drop(request)
            self._deadlines.pop(request, None)
            return
        state = self._alive[request]
        for sequence in state.sequences:
            if sequence.answer is None:
                self.scheduler.remove(sequence)
        self._forget(state)

    def _forget(self, state: RequestState) -> None:
        del self._alive[state.id]
        self._deadlines.pop(state.id, None)
        state.sequences.clear()  # they refer to it: a circle would wait for the garbage collector
