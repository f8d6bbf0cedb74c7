"""A training run as one moving line, or in a pipe as a line every few seconds: loss, tokens per second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from softprompt.cli.console import say, words
from softprompt.training import Checkpoint, Event, StepDone

_LINE_EVERY_S = 5.0  # where stderr is no terminal


class TrainingProgress:
    """Use as a context; `begin` once the number of steps is known, then `take` every event."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=words, disable=not words.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._tokens = 0
        self._began = self._last_line = 0.0
        self._num_steps = 0
        self._first_step = 0  # of this process; a resumed run has done some already
        self._validation = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, num_steps: int) -> None:
        self._began = self._last_line = self._clock()
        self._num_steps = num_steps
        self._task = self._bar.add_task("training", total=num_steps, figures="")

    def take(self, event: Event) -> None:
        if isinstance(event, Checkpoint) and event.validation_loss is not None:
            self._validation = f", validation {event.validation_loss:.3f}"
        if isinstance(event, StepDone) and self._task is not None:
            self._tokens += event.num_tokens
            now = self._clock()
            rate = self._tokens / max(now - self._began, 1e-9)
            figures = f"loss {event.loss:.3f}{self._validation}, {rate:,.0f} tokens/s"
            self._bar.update(self._task, completed=event.step, figures=figures)
            self._first_step = self._first_step or event.step
            if self._bar.disable and now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                say(f"step {event.step:,} of {self._num_steps:,}, {figures}, {self._left(event.step, now)} left")

    def _left(self, step: int, now: float) -> str:
        """Minutes and seconds at the rate until now."""
        done = step - self._first_step + 1
        seconds = round((now - self._began) / done * max(self._num_steps - step, 0))
        return f"{seconds // 60}:{seconds % 60:02d}"
