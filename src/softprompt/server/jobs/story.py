"""What a running job tells: its events and what it has come to, gathered and written now and then.

A fast run takes a thousand steps a second. All of them stand in the run's `metrics.jsonl`; the events are a few each
second, written in one transaction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from softprompt.server.jobs.records import JobRecords, NewEvent
from softprompt.server.jobs.schemas import Json
from softprompt.server.state.schema import JobRow
from softprompt.training import Checkpoint, StepDone

_WRITE_EVERY_S = 0.5
_METRICS_EVERY_S = 0.1
_MOST_METRICS = 1_000  # events of a job, validations apart


class Story:
    """Of one job. `outcome` is what the row's column of that name becomes."""

    def __init__(self, records: JobRecords, row: JobRow, clock: Callable[[], float] = time.time) -> None:
        self.outcome: Json = dict(row.outcome)
        self._records, self._job, self._clock = records, row.id, clock
        self._events: list[NewEvent] = []
        self._written = self._measured = -math.inf
        self._total_steps = self._first_step = 0
        self._measured_step = 0
        self._began = 0.0
        self._last_loss: float | None = None

    def begin(self, step: int, total_steps: int, trained_tokens: int) -> None:
        """Training begins, or goes on, behind `step`."""
        self._first_step, self._total_steps, self._began = step, total_steps, self._clock()
        self._measured_step = step
        self.outcome |= {"trained_tokens": trained_tokens, "steps": step, "total_steps": total_steps}

    def say(self, message: str, level: str = "info") -> None:
        self._events.append(NewEvent(message, level=level))

    def step(self, event: StepDone) -> None:
        """A step is done; it becomes an event where there was none just before."""
        self._last_loss = finite(event.loss)
        now = self._clock()
        per_step = (now - self._began) / (event.step - self._first_step)
        self.outcome |= {
            "steps": event.step,
            "trained_tokens": self.outcome["trained_tokens"] + event.num_tokens,
            "estimated_finish": now + per_step * (self._total_steps - event.step),
        }
        is_due = (event.step - self._measured_step) * _MOST_METRICS >= self._total_steps
        if (is_due and now - self._measured >= _METRICS_EVERY_S) or event.step == self._total_steps:
            self._measured, self._measured_step = now, event.step
            self._add_metrics(event.step, {"learning_rate": event.learning_rate, "epoch": event.epoch})

    def checkpoint(self, event: Checkpoint) -> Json:
        """A prompt on its way was kept: its metrics, in OpenAI's words."""
        valid = finite(event.validation_loss)
        metrics = {"step": event.step, "train_loss": self._last_loss, "valid_loss": valid, "full_valid_loss": valid}
        if valid is not None:
            scored = {} if event.score is None else {"score": finite(event.score)}
            self._add_metrics(event.step, {"valid_loss": valid, "full_valid_loss": valid, **scored})
        return metrics

    def _add_metrics(self, step: int, more: Json) -> None:
        data = {"step": step, "total_steps": self._total_steps, "train_loss": self._last_loss, **more}
        words = [f"step {step:,} of {self._total_steps:,}"]
        words += [
            f"{said} loss {data[name]:.4f}"
            for name, said in (("train_loss", "training"), ("valid_loss", "validation"))
            if data.get(name) is not None
        ]
        self._events.append(NewEvent(", ".join(words), data, kind="metrics"))

    def write(self, *, now: bool = True) -> None:
        """Into the database: at once, or, without `now`, where the last time is some while ago."""
        if now or self._clock() - self._written >= _WRITE_EVERY_S:
            events, self._events = self._events, []
            self._records.tell(self._job, events, self.outcome)
            self._written = self._clock()

    def rest(self) -> list[NewEvent]:
        """The events that are not yet written, for a transaction of the caller's."""
        events, self._events = self._events, []
        return events


def finite(number: float | None) -> float | None:
    """JSON knows no other numbers."""
    return number if number is not None and math.isfinite(number) else None
