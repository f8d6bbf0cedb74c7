"""Long work as one moving line, or, where stderr is no terminal, as a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from softprompt.cli.console import say, words

_LINE_EVERY_S = 5.0


class ProgressLine:
    """How much of some work is done, with figures of it and the time left. Use as a context, and `begin` inside.

    `name` stands before the bar, `unit` before the number of what is done ("step 3 of 10").
    """

    def __init__(self, name: str, unit: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._name, self._unit = clock, name, unit
        self._bar = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=words, disable=not words.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._total = 0
        self._num_before = 0
        self._began = self._last_line = 0.0

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, total: int, num_before: int = 0) -> None:
        """`num_before` of `total` are done by an earlier process."""
        self._began = self._last_line = self._clock()
        self._total, self._num_before = total, num_before
        self._task = self._bar.add_task(self._name, total=total, completed=num_before, figures="")

    @property
    def seconds(self) -> float:
        """Since the beginning; never 0."""
        return max(self._clock() - self._began, 1e-9)

    def show(self, num_done: int, figures: str) -> None:
        """`num_done` with those done before."""
        assert self._task is not None, "it has begun"
        self._bar.update(self._task, completed=num_done, figures=figures)
        now = self._clock()
        if self._bar.disable and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            say(f"{self._unit} {num_done:,} of {self._total:,}, {figures}, {self._left(num_done)} left")

    def _left(self, num_done: int) -> str:
        """Minutes and seconds, at the rate so far."""
        seconds = round(self.seconds / max(num_done - self._num_before, 1) * max(self._total - num_done, 0))
        return f"{seconds // 60}:{seconds % 60:02d}"
