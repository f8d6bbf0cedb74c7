"""What the next step runs. It decides and moves no tensor; memory is asked for through each row's runner.

Rows that are answering always get their one token, so that nobody stalls; texts are read in the tokens that are left,
in pieces where they are long. Where every token makes a step longer, a short text is read over a few steps, too.
When memory is short the youngest row gives its own back and waits again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from softprompt.engine.sequence import Row

_FEW_POSITIONS = 16  # up to so many take a CPU hardly longer than one: the weights come from memory
_IDLE_FACTOR = 8  # where nobody is answering, a step may read so many times as much
Plan = list[tuple[Row, int]]  # rows of the step, and how many positions each runs


class Scheduler:
    """Rows waiting and running."""

    def __init__(self, max_rows: int, max_step_tokens: int, num_reading_steps: int = 1) -> None:
        """A text may be read over `num_reading_steps` steps for the sake of those who are answering."""
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.num_reading_steps = num_reading_steps
        self.waiting = WaitingRows()
        self.running: list[Row] = []  # the oldest first
        self.num_preemptions = 0

    def enter(self, row: Row) -> None:
        self.waiting.enter(row)

    def leave(self, row: Row) -> None:
        """A row has ended, or is given up."""
        if row in self.running:
            self.running.remove(row)
            row.runner.stop(row)
        elif row.answer is None:
            self.waiting.remove(row)
        self.waiting.leave(row)

    def plan(self) -> Plan:
        """The rows of the next step. Empty only where nothing is running or can start."""
        was_short = self._make_room()
        plan = [(row, 1) for row in self.running if row.is_answering]
        budget = self._budget(len(plan))
        for row in self.running:
            if not row.is_answering and budget.left > 0:
                plan.append((row, budget.take(row)))
        return plan if was_short and plan else plan + self._admitted(budget)

    def _budget(self, num_answering: int) -> _Budget:
        left = self.max_step_tokens * (1 if num_answering else _IDLE_FACTOR)
        calm = max(num_answering, _FEW_POSITIONS - num_answering) if num_answering else left
        return _Budget(left, calm, self.num_reading_steps)

    def _make_room(self) -> bool:
        """Memory for the next token of every answering row, the oldest first; whether somebody had to give way."""
        was_short = False
        for row in list(self.running):
            while row in self.running and row.is_answering and not row.runner.make_room(row):
                was_short = True
                self._preempt(next(other for other in reversed(self.running) if other.runner is row.runner))
        return was_short

    def _preempt(self, row: Row) -> None:
        self.running.remove(row)
        row.runner.stop(row)
        self.waiting.push(row)
        self.num_preemptions += 1

    def _admitted(self, budget: _Budget) -> Plan:
        plan: Plan = []
        later: list[Row] = []
        while budget.left > 0 and len(self.waiting) and len(self.running) < self.max_rows:
            row = self.waiting.pop()
            if row.is_behind_report or row.runner.is_worth_waiting(row):
                later.append(row)
                continue
            if not row.runner.start(row):
                later.append(row)
                break
            self.running.append(row)
            plan.append((row, budget.take(row)))
        for row in later:
            self.waiting.push(row)
        return plan


@dataclass
class _Budget:
    """What one step may read of texts."""

    left: int
    calm: int  # so many do not make the step much longer
    num_steps: int

    def take(self, row: Row) -> int:
        """How many positions a row runs: within what is calm, or else as many as its text may take steps for."""
        least = max(self.calm, ceil(row.length / self.num_steps))
        count = min(row.remaining, self.left, least) if row.runner.reads_in_pieces else row.remaining
        self.left -= count
        self.calm -= count
        return count


# --

_GENERATED = 2  # a token chosen weighs as much as so many read

Entry = tuple[int, int, int, Row]  # priority, request, choice


class WaitingRows:
    """Rows that have no memory yet, or had to give theirs back."""

    def __init__(self) -> None:
        self._heaps: dict[str | None, list[Entry]] = {}
        self._service: dict[str | None, float] = {}
        self._num_rows: dict[str | None, int] = {}  # of each client, waiting or running

    def __len__(self) -> int:
        return sum(len(heap) for heap in self._heaps.values())

    def __iter__(self) -> Iterator[Row]:
        return (entry[-1] for heap in self._heaps.values() for entry in heap)

    def enter(self, row: Row) -> None:
        """A new row."""
        client = row.request.client
        if not self._num_rows.get(client):
            self._lift(client)
        self._num_rows[client] = self._num_rows.get(client, 0) + 1
        self.push(row)

    def leave(self, row: Row) -> None:
        """A row has ended, wherever it was."""
        client = row.request.client
        self._num_rows[client] -= 1
        if not self._num_rows[client]:
            del self._num_rows[client]
            self._forget()

    def push(self, row: Row) -> None:
        entry = (row.request.priority, row.owner.id, row.choice, row)
        heapq.heappush(self._heaps.setdefault(row.request.client, []), entry)

    def pop(self) -> Row:
        """The next row."""
        client = min(self._heaps, key=lambda name: self._claim(name))
        row = heapq.heappop(self._heaps[client])[-1]
        if not self._heaps[client]:
            del self._heaps[client]
        return row

    def remove(self, row: Row) -> None:
        client = row.request.client
        kept = [entry for entry in self._heaps[client] if entry[-1] is not row]
        heapq.heapify(kept)
        self._heaps[client] = kept
        if not kept:
            del self._heaps[client]

    def charge(self, row: Row, num_read: int, num_chosen: int) -> None:
        """Tokens that were run for a row, and chosen."""
        client = row.request.client
        self._service[client] = self._service.get(client, 0.0) + num_read + _GENERATED * num_chosen

    def _claim(self, client: str | None) -> tuple[int, float, int, int]:
        priority, request, choice, _ = self._heaps[client][0]
        return priority, self._service.get(client, 0.0), request, choice

    def _lift(self, client: str | None) -> None:
        least = min((self._service.get(other, 0.0) for other in self._num_rows), default=0.0)
        self._service[client] = max(self._service.get(client, 0.0), least)

    def _forget(self) -> None:
        """Clients that are away and have had no more than those that are here lose nothing by being forgotten."""
        least = min((self._service.get(client, 0.0) for client in self._num_rows), default=float("inf"))
        for client in [name for name, had in self._service.items() if name not in self._num_rows and had <= least]:
            del self._service[client]
