"""What the next step runs. It decides and moves no tensor; memory is asked for through each row's runner.

Rows that are answering always get their one token, so that nobody stalls; texts are read in the tokens that are left,
in pieces where they are long. Where every token makes a step longer, a short text is read over a few steps, too.
When memory is short the youngest row gives its own back and waits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from softprompt.engine.rows import Row
from softprompt.engine.waiting import WaitingRows

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
