"""Two threads that compute on one machine take turns: answering goes first, training fills what is left.

Two pools of threads on the same cores make both slower and neither predictable, so only one of the two computes at a
time. The training thread calls `breathe()` between small pieces of work (a product with a weight, an attention, a block
of the head), in its forward and in its backward pass alike; there it is held while it is the other's turn. Training has
no say in its results: the same pieces run in the same order, only later.

While requests are being answered, each of the engine's steps gives training some time, `share / (1 - share)` of what
the step took and at most `latency_s`; a piece runs when the time at hand is as long as such pieces have taken. Without
requests training runs freely. No torch here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_THREAD = threading.local()
_PATIENCE_S = 0.25  # the engine waits for a training that does not breathe no longer than that


def breathe() -> None:
    """Between two pieces of work: wait here while it is another thread's turn. Nothing where nobody takes turns."""
    pause: Callable[[], None] | None = getattr(_THREAD, "pause", None)
    if pause is not None:
        pause()


class Turns:
    """Who computes: the engine's thread inside of `first`, or the training's inside of `second`."""

    def __init__(
        self, share: float = 0.45, latency_s: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`share` of the time is training's while requests are answered; a step is delayed by `latency_s` at most."""
        self._ratio = share / (1 - share)
        self._latency = latency_s
        self._clock = clock
        self._changed = threading.Condition()
        self._is_wanted = False  # the engine has work: training runs on what it was given
        self._is_parked = True  # training computes nothing
        self._given = 0.0  # seconds that training has at hand
        self._began = 0.0  # when training's present piece did
        self._piece = 0.0  # seconds, what a piece takes; the longest of late

    @contextmanager
    def first(self) -> Iterator[None]:
        """One step of the engine. It begins when training has stopped, or has not breathed for too long."""
        with self._changed:
            self._is_wanted = True
            self._changed.wait_for(lambda: self._is_parked, _PATIENCE_S)
        began = self._clock()
        try:
            yield
        finally:
            with self._changed:
                self._given += self._ratio * (self._clock() - began)
                if self._latency is not None:
                    self._given = min(self._given, self._latency)
                self._changed.notify_all()

    def idle(self) -> None:
        """The engine has nothing to do: training runs freely."""
        with self._changed:
            self._is_wanted = False
            self._changed.notify_all()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Training, in this thread: `breathe` waits for its turn."""
        _THREAD.pause = self._pause
        try:
            self._pause()
            yield
        finally:
            _THREAD.pause = None
            with self._changed:
                self._is_parked = True
                self._changed.notify_all()

    def _pause(self) -> None: ...
