"""Two threads that compute on one machine take turns: answering goes first, training fills what is left.

Two pools of threads on the same cores make both slower and neither predictable, so one of the two computes at a time,
and puts its pool away when it stops.
The training thread calls `breathe()` before each small piece of work (a product with a weight, an attention, a block of
the head), in its forward and its backward pass alike; there it is held while it is the other's turn. It has no say in
the results: the same pieces run in the same order, only later.

While requests are answered, each of the engine's steps gives training some time at hand: `share / (1 - share)` of what
the step took, but of an unusually long one no more than of others, and `latency_s` at most. A piece runs when what is
at hand is as long as pieces have taken of late; what is left over is kept for the next turn (a deficit round robin,
Shreedhar and Varghese 1995). Without requests training runs freely. No torch here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from softprompt.openmp import put_threads_away

_THREAD = threading.local()
_PATIENCE_S = 0.25  # how long a step waits for a training that does not breathe
_FORGETTING = 0.98  # of the longest piece, per piece
_NEWS = 0.05  # of the usual step, per step
_LENIENCE = 1.2  # times the usual step: a step that took longer gives training no more


def breathe() -> None:
    """Before a piece of work: wait here while it is another thread's turn. Nothing where nobody takes turns."""
    pause: Callable[[], None] | None = getattr(_THREAD, "pause", None)
    if pause is not None:
        pause()


@contextmanager
def interrupted_by(check: Callable[[], None]) -> Iterator[None]:
    """Work in this thread that takes no turns: `breathe` calls `check`, and what that raises ends the work there."""
    _THREAD.pause = check
    try:
        yield
    finally:
        _THREAD.pause = None


class Turns:
    """Who computes: the engine's thread inside of `first`, or the training's inside of `second`."""

    def __init__(
        self, share: float = 0.46, latency_s: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`share` of the time is training's while requests are answered; `latency_s` at most in front of a step.

        A piece that is longer than that runs all the same, when enough steps have given it the time.
        """
        self._ratio = share / (1 - share)
        self._latency = float("inf") if latency_s is None else latency_s
        self._clock = clock
        self._changed = threading.Condition()
        self._has_requests = False
        self._is_stepping = False  # the engine computes
        self._is_training = False  # the training does
        self._is_held = False  # it waits for its turn
        self._is_deaf = False  # training has not breathed for longer than a step waits
        self._at_hand_s = 0.0  # what training may still take
        self._usual_s = 0.0  # what a step gives
        self._piece_s = 0.0  # what a piece takes: the longest of late
        self._began = 0.0  # when the training's present piece did

    @contextmanager
    def first(self) -> Iterator[None]:
        """One step of the engine. It begins when training has stopped, or has not breathed for too long."""
        with self._changed:
            self._has_requests = True
            if not self._is_deaf:
                self._is_deaf = not self._changed.wait_for(lambda: not self._is_training, _PATIENCE_S)
            self._is_stepping = True
        began = self._clock()
        try:
            yield
        finally:
            with self._changed:
                self._is_stepping = False
                self._give(self._ratio * (self._clock() - began))
                if self._is_held and self._may_train():
                    put_threads_away()
                    self._hand_over()

    def idle(self) -> None:
        """The engine has nothing to do: training runs freely. In the engine's thread."""
        put_threads_away()
        with self._changed:
            self._has_requests = False
            self._at_hand_s = 0.0
            self._hand_over()

    @contextmanager
    def second(self, hear: Callable[[], None] | None = None) -> Iterator[None]:
        """Training, in this thread: from here on `breathe` waits for its turn.

        Then it calls `hear`, and what that raises ends the training there.
        """
        _THREAD.pause = self._pause if hear is None else partial(self._pause_and, hear)
        self._began = self._clock()
        self._pause()
        try:
            yield
        finally:
            _THREAD.pause = None
            with self._changed:
                self._stop()

    def _give(self, seconds: float) -> None:
        """More than a turn's worth and a piece is not saved up. A slow step is not made slower still."""
        self._usual_s += (_NEWS if self._usual_s else 1.0) * (seconds - self._usual_s)
        turn = min(seconds, _LENIENCE * self._usual_s, self._latency)
        self._at_hand_s = min(self._at_hand_s + turn, turn + self._piece_s)

    def _pause(self) -> None:
        with self._changed:
            if self._is_training:
                self._account(self._clock() - self._began)
            self._is_held = True
            self._hand_over()
            if self._is_held:
                put_threads_away()
                self._stop()
                self._changed.wait_for(lambda: not self._is_held)
            self._is_deaf = False
            self._began = self._clock()

    def _pause_and(self, hear: Callable[[], None]) -> None:
        self._pause()
        hear()

    def _account(self, seconds: float) -> None:
        """A piece is done."""
        if self._is_deaf:  # it was no piece: data were read, say
            return
        self._piece_s = max(seconds, _FORGETTING * self._piece_s)
        self._at_hand_s = max(self._at_hand_s - seconds, -self._piece_s)

    def _may_train(self) -> bool:
        return not self._has_requests or (not self._is_stepping and self._at_hand_s >= self._piece_s)

    def _hand_over(self) -> None:
        """Training goes on, if it is held and may. Said here and not seen to by it: the next step would be faster."""
        if self._is_held and self._may_train():
            self._is_held, self._is_training = False, True
            self._changed.notify_all()

    def _stop(self) -> None:
        self._is_training = False
        self._changed.notify_all()
