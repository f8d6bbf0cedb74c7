"""Which sequences the next step runs, and how many positions of each. Moves no tensor; memory is asked for through each
sequence's runner.

Sequences that are decoding always get their one token, so that none stalls; the rest of the step's budget goes to texts
that are read in, in chunks where they are long. Where every token makes a step longer, a short text is read over a few
steps, too. When memory is short the youngest sequence is preempted: it frees its memory and waits again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Generic, Protocol, TypeVar

from softprompt.engine.sequence import Sequence

_FEW_POSITIONS = 16  # a CPU runs up to so many in hardly more time than one: loading the weights takes longest
_IDLE_FACTOR = 8  # where no sequence is decoding, a step may read so many times as much
_NEW_TOKEN_COST = 2  # times that of a token which is read

Plan = list[tuple[Sequence, int]]  # sequences of the step, and how many positions each runs


class Scheduler:
    """The waiting and the running sequences."""

    def __init__(self, max_sequences: int, max_step_tokens: int, num_prefill_steps: int = 1) -> None:
        """A text may be read over `num_prefill_steps` steps, so that decoding sequences wait less."""
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.num_prefill_steps = num_prefill_steps
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []  # the oldest first
        self.num_preemptions = 0

    @property
    def max_idle_tokens(self) -> int:
        """Tokens that a step may read where no sequence is decoding."""
        return self.max_step_tokens * _IDLE_FACTOR

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, or was aborted."""
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.runner.stop(sequence)
        elif sequence.answer is None:
            self.waiting.remove(sequence)
        self.waiting.end(sequence)

    def plan(self) -> Plan:
        """The next step. Empty only where no sequence is running or can start."""
        was_short = self._grow_or_preempt()
        plan = [(sequence, 1) for sequence in self.running if sequence.is_decoding]
        budget = self._budget(len(plan))
        for sequence in self.running:
            if not sequence.is_decoding and budget.left > 0:
                plan.append((sequence, budget.spend(sequence)))
        return plan if was_short and plan else plan + self._started(budget)

    def _budget(self, num_decoding: int) -> _PrefillBudget:
        left = self.max_step_tokens if num_decoding else self.max_idle_tokens
        cheap = max(num_decoding, _FEW_POSITIONS - num_decoding) if num_decoding else left
        return _PrefillBudget(left, cheap, self.num_prefill_steps)

    def _grow_or_preempt(self) -> bool:
        """Memory for the next token of every decoding sequence, the oldest first; whether any was preempted for it."""
        was_short = False
        for sequence in list(self.running):
            while sequence in self.running and sequence.is_decoding and not sequence.runner.grow(sequence):
                was_short = True
                self._preempt(next(other for other in reversed(self.running) if other.runner is sequence.runner))
        return was_short

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.runner.stop(sequence)
        self.waiting.push(sequence)
        self.num_preemptions += 1

    def _started(self, budget: _PrefillBudget) -> Plan:
        plan: Plan = []
        postponed: list[Sequence] = []
        while budget.left > 0 and len(self.waiting) and len(self.running) < self.max_sequences:
            sequence = self.waiting.pop()
            if sequence.waits_for_prompt_logprobs or sequence.runner.should_wait_for_prefix(sequence):
                postponed.append(sequence)
                continue
            if not sequence.runner.start(sequence):
                postponed.append(sequence)
                break
            self.running.append(sequence)
            plan.append((sequence, budget.spend(sequence)))
        for sequence in postponed:
            self.waiting.push(sequence)
        return plan


@dataclass
class _PrefillBudget:
    """Tokens of texts that one step may read."""

    left: int
    cheap: int  # so many do not make the step much longer
    num_steps: int

    def spend(self, sequence: Sequence) -> int:
        """How many positions a sequence runs: the cheap ones, or more where its text must not take more steps."""
        wanted = max(self.cheap, ceil(sequence.length / self.num_steps))
        is_chunked = sequence.runner.supports_chunked_prefill
        count = min(sequence.remaining, self.left, wanted) if is_chunked else sequence.remaining
        self.left -= count + sequence.num_to_encode
        self.cheap -= count + sequence.num_to_encode
        return count


class Waiting(Protocol):
    """Work of one client that waits for its turn."""

    @property
    def client(self) -> str | None: ...

    @property
    def order(self) -> tuple[int, int, int]:
        """Of its client's work the lowest is next: priority, request, choice."""
        ...


_Item = TypeVar("_Item", bound=Waiting)


class FairQueue(Generic[_Item]):
    """Work without memory: by priority, then the client that was served least, then the oldest request.

    Service is counted in tokens, by the virtual token counter of Sheng et al. (2401.00588): a client that comes back
    starts level with the least served client that is there, so that absence saves up no claim.
    """

    def __init__(self) -> None:
        self._heaps: dict[str | None, list[tuple[tuple[int, int, int], _Item]]] = {}
        self.service: dict[str | None, float] = {}  # tokens that each client was served
        self._num_items: dict[str | None, int] = {}  # of each client, waiting or running

    def __len__(self) -> int:
        return sum(len(heap) for heap in self._heaps.values())

    def __iter__(self) -> Iterator[_Item]:
        return (entry[-1] for heap in self._heaps.values() for entry in heap)

    def add(self, item: _Item) -> None:
        """New work."""
        if not self._num_items.get(item.client):
            self._catch_up(item.client)
        self._num_items[item.client] = self._num_items.get(item.client, 0) + 1
        self.push(item)

    def end(self, item: _Item) -> None:
        """Work has ended, waiting or running."""
        self._num_items[item.client] -= 1
        if not self._num_items[item.client]:
            del self._num_items[item.client]
            self._forget_absent()

    def push(self, item: _Item) -> None:
        heapq.heappush(self._heaps.setdefault(item.client, []), (item.order, item))

    def pop(self) -> _Item:
        client = min(self._heaps, key=self._priority)
        item = heapq.heappop(self._heaps[client])[-1]
        if not self._heaps[client]:
            del self._heaps[client]
        return item

    def remove(self, item: _Item) -> None:
        heap = [entry for entry in self._heaps[item.client] if entry[-1] is not item]
        heapq.heapify(heap)
        self._heaps[item.client] = heap
        if not heap:
            del self._heaps[item.client]

    def charge(self, item: _Item, num_read: int, num_new: int) -> None:
        """Count tokens that were run for some work, and sampled."""
        self.service[item.client] = self.service.get(item.client, 0.0) + num_read + _NEW_TOKEN_COST * num_new

    def assert_empty(self) -> None:
        """Nothing is left of any work or client. Raises AssertionError."""
        assert not self._heaps and not self.service and not self._num_items

    def _priority(self, client: str | None) -> tuple[int, float, int, int]:
        priority, request, choice = self._heaps[client][0][0]
        return priority, self.service.get(client, 0.0), request, choice

    def _catch_up(self, client: str | None) -> None:
        least = min((self.service.get(other, 0.0) for other in self._num_items), default=0.0)
        self.service[client] = max(self.service.get(client, 0.0), least)

    def _forget_absent(self) -> None:
        """Clients without work that were served no more than the others lose nothing by being forgotten."""
        least = min((self.service.get(client, 0.0) for client in self._num_items), default=float("inf"))
        for client in [name for name, had in self.service.items() if name not in self._num_items and had <= least]:
            del self.service[client]
