"""A generation engine: many requests, each with its own soft prompt or none, in one running batch over one frozen base.

`add` admits a request, `step` does one bounded piece of work, and every admitted id ends in exactly one terminal event.
One thread owns an engine; `softprompt.engine.AsyncEngine` is for all others. Knows nothing of HTTP or of the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.config import EngineConfig
from softprompt.engine.detokenizer import AnswerText
from softprompt.engine.kv_cache import is_out_of_memory
from softprompt.engine.model_runner import Runners, make_runners
from softprompt.engine.prefix_cache import shared_beginnings
from softprompt.engine.prompt_logprobs import new_report, report_texts
from softprompt.engine.request import (
    DEFAULT_SAMPLING,
    Aborted,
    AbortReason,
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    Request,
    check_request,
)
from softprompt.engine.sampler import Chooser, Chosen
from softprompt.engine.scheduler import Plan, Scheduler
from softprompt.engine.sequence import Admitted, Row, take_token
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`arrange`: get ready for many requests: keep the weights a second time, as this processor reads them
        fastest, where it gains, and take the memory for keys and values of short rows now."""
        self.base = base
        self.config = config or EngineConfig()
        self.forward = forward or forward_of(base)
        self.runners: Runners = make_runners(base, self.forward, self.config, arrange)
        self.scheduler = Scheduler(self.runners.max_rows, self.runners.max_step_tokens, self.runners.num_reading_steps)
        self.counts = Counts()
        self._chooser = Chooser(base)
        self._clock = clock
        self._alive: dict[int, Admitted] = {}
        self._has_deadline: dict[int, float] = {}
        self._given_up: dict[int, AbortReason] = {}
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would bring something."""
        return bool(self._alive)

    @property
    def notes(self) -> tuple[str, ...]:
        """How this base runs, and why not faster, for people."""
        return self.runners.notes

    def add(self, request: Request) -> int:
        """Admit a request; its id.

        Raises LengthError, PromptError, DataError or ConfigError where it cannot be answered, MemoryLimitError where
        it is longer than the memory for keys and values, and QueueFullError where too many wait.
        """
        self.check(request)
        if self.config.max_waiting is not None and len(self.scheduler.waiting) >= self.config.max_waiting:
            raise QueueFullError(f"{self.config.max_waiting} requests wait already; try again later")
        deadline = None if request.timeout_s is None else self._clock() + request.timeout_s
        admitted = Admitted(self._next_id, request, deadline)
        admitted.rows = [self._new_row(admitted, choice) for choice in range(request.num_choices)]
        self._next_id += 1
        self._alive[admitted.id] = admitted
        if deadline is not None:
            self._has_deadline[admitted.id] = deadline
        for row in admitted.rows:
            self.scheduler.enter(row)
        return admitted.id

    def check(self, request: Request) -> None:
        """Raise what `add` would raise for this request, but for guides and a full queue. Any thread may call it."""
        check_request(self.base, request)
        if not self.runners.of(request).can_ever_hold(request.max_length):
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
            self._chooser.prepare(request.sampling, request.cache_salt)

    def abort(self, request: int) -> None:
        """Give a request up; the next step says so. One that has ended, or never was, is let be."""
        if request in self._alive:
            self._given_up.setdefault(request, "asked")

    def pin(self, prompt: SoftPrompt) -> None:
        """Once computed, a soft prompt's keys and values are never given up for others', until `unpin`.

        Raises MemoryLimitError where pinned ones would take more than half of `prefix_bytes`.
        """
        if not self.runners.pin(prompt):
            raise MemoryLimitError(
                f"{prompt.num_virtual_tokens} virtual tokens more would take over half of the memory for prefixes "
                f"({self.runners.prefixes.budget_bytes:,} bytes); unpin another prompt, or raise prefix_bytes"
            )

    def unpin(self, prompt: SoftPrompt) -> None:
        """They may be given up again. One that is not pinned is let be."""
        self.runners.unpin(prompt)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward, and what came of it."""
        events = self._give_up()
        plan = self.scheduler.plan()
        if plan:
            self.counts.num_steps += 1
            return events + self._run(plan)
        if self._alive and not self.scheduler.running:  # the machine has less memory than the engine was allowed
            next_one = min(self.scheduler.waiting, key=lambda row: row.owner.id)
            events += self._fail({next_one.owner}, "out of memory: there is none for its keys and values")
        return events

    def stats(self) -> EngineStats:
        """Figures as they stand."""
        return self.counts.with_state(self.scheduler, self.runners)

    @torch.inference_mode()
    def close(self) -> None:
        """Forget everything that is running, without a word."""
        for admitted in list(self._alive.values()):
            self._drop(admitted)
        self._given_up.clear()

    def check_integrity(self) -> None:
        """Every row is in one place, and memory and pins are what rows hold. Raises AssertionError."""
        rows = [row for admitted in self._alive.values() for row in admitted.rows if row.answer is None]
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(rows) == len(running) + len(waiting) and set(rows) == {*running, *waiting}
        self.runners.check_integrity(running)

    def _new_row(self, owner: Admitted, choice: int) -> Row:
        request = owner.request
        sampling = request.sampling or DEFAULT_SAMPLING
        runner = self.runners.of(request)
        row = Row(
            owner=owner,
            choice=choice,
            runner=runner,
            choosing=self._chooser.new_row(sampling, request.ids, choice, request.cache_salt),
            text=AnswerText(self.base, request.ids, sampling.stop, sampling.min_new_tokens),
            ids=list(request.ids),
            text_log_probs=new_report(request) if choice == 0 else None,
        )
        if runner is self.runners.held:
            is_asked_again = request.num_choices > 1
            row.keys = shared_beginnings(request.prompt, request.ids, is_asked_again, request.cache_salt)
        return row

    def _run(self, plan: Plan) -> list[Event]:
        """The step's forward, and one token for every row that was run to its end."""
        try:
            hidden, telling = self.runners.run(plan)
            unsound = report_texts(self.base, self.forward, telling) if telling else []
            rows = [row for row, _ in plan if row.remaining == 0]
            is_at_end = torch.tensor([row.remaining == 0 for row, _ in plan], device=hidden.device)
            chosen = self._choose(hidden[is_at_end], rows) if rows else []
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return self._fail({row.owner for row, _ in plan}, f"out of memory: {error}")
        for row, count in plan:
            self.scheduler.waiting.charge(row, count, row.remaining == 0)
            self.counts.num_read_tokens += count
        return self._fail_unsound(unsound) + self._take(rows, chosen)

    def _choose(self, hidden: Tensor, rows: list[Row]) -> list[Chosen | None]:
        wanted = [row.request.num_log_probs for row in rows]
        return self._chooser.choose(self.forward.logits(hidden), [row.choosing for row in rows], wanted)

    def _take(self, rows: list[Row], chosen: list[Chosen | None]) -> list[Event]:
        events: list[Event] = []
        for row, choice in zip(rows, chosen, strict=True):
            if row.owner.id not in self._alive:
                continue  # it failed together with another choice of its request
            if choice is None:
                events += self._fail_stuck(row, row.choosing.problem)
                continue
            self.counts.num_new_tokens += 1
            if row.text_log_probs is not None:
                events.append(PromptLogprobs(row.owner.id, tuple(row.text_log_probs)))
                row.text_log_probs = None
            events.append(take_token(self.base, row, choice))
            if row.answer is not None:
                self.scheduler.leave(row)
                events += self._finish(row.owner)
        return events

    def _finish(self, admitted: Admitted) -> list[Event]:
        """The terminal event of a request whose last choice has ended."""
        answers = [row.answer for row in admitted.rows if row.answer is not None]
        if len(answers) < len(admitted.rows):
            return []
        first = admitted.rows[0]
        num_cached = max(0, (first.num_cached or 0) - first.num_virtual)
        end = Finished(admitted.id, tuple(answers), len(admitted.request.ids), first.num_virtual, num_cached)
        self._forget(admitted)
        self.counts.num_finished += 1
        return [end]

    def _fail_stuck(self, row: Row, problem: str | None) -> list[Event]:
        """No token could be chosen: its guide says why, or the base computes NaN."""
        return self._fail_unsound([row]) if problem is None else self._fail({row.owner}, problem, is_request_fault=True)

    def _fail_unsound(self, rows: Sequence[Row]) -> list[Event]:
        why = f"base {self.base.name!r} computes NaN in {self.base.dtype}; load it in float32 or bfloat16"
        return self._fail({row.owner for row in rows}, why)

    def _fail(self, owners: Iterable[Admitted], why: str, *, is_request_fault: bool = False) -> list[Event]:
        events: list[Event] = []
        for admitted in sorted(owners, key=lambda owner: owner.id):
            self._drop(admitted)
            self.counts.num_failed += 1
            events.append(Failed(admitted.id, why, is_request_fault))
        return events

    def _give_up(self) -> list[Event]:
        """Requests that were aborted, or whose time is over."""
        now = self._clock() if self._has_deadline else 0.0
        for request, deadline in self._has_deadline.items():
            if deadline <= now:
                self._given_up.setdefault(request, "deadline")
        events: list[Event] = []
        for request, reason in self._given_up.items():
            self._drop(self._alive[request])
            self.counts.num_aborted += 1
            events.append(Aborted(request, reason))
        self._given_up.clear()
        return events

    def _drop(self, admitted: Admitted) -> None:
        for row in admitted.rows:
            if row.answer is None:
                self.scheduler.leave(row)
        self._forget(admitted)

    def _forget(self, admitted: Admitted) -> None:
        del self._alive[admitted.id]
        self._has_deadline.pop(admitted.id, None)
        admitted.rows.clear()  # they know their owner: a circle would wait for the garbage collector
