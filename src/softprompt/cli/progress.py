"""A training run as one moving line: loss, tokens per second, time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from softprompt.cli.console import words
from softprompt.training import Checkpoint, Event, StepDone


class TrainingProgress:
    """Use as a context; `begin` once the number of steps is known, then `take` every event."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=words, disable=not words.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._tokens = 0
        self._began = 0.0
        self._validation = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, num_steps: int) -> None:
        self._began = time.perf_counter()
        self._task = self._bar.add_task("training", total=num_steps, figures="")

    def take(self, event: Event) -> None:
        if isinstance(event, Checkpoint) and event.validation_loss is not None:
            self._validation = f", validation {event.validation_loss:.3f}"
        if isinstance(event, StepDone) and self._task is not None:
            self._tokens += event.num_tokens
            rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
            figures = f"loss {event.loss:.3f}{self._validation}, {rate:,.0f} tokens/s"
            self._bar.update(self._task, completed=event.step, figures=figures)
