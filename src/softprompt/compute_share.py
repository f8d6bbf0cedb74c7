"""Two threads that compute on one machine share it: inference goes first, training fills what is left.

Two pools of threads on the same cores make both slower and neither predictable, so only one of the two computes at a
time, and releases its pool of OpenMP threads when it stops.
The training thread calls `yield_point()` before each small piece of work (a product with a weight, an attention, a
block of the head), in its forward and its backward pass alike, and waits there while the engine computes. Results do
not depend on it: the same pieces run in the same order, only later.

While requests are answered, each of the engine's steps earns training some time: `share / (1 - share)` of what the step
took, but no more for an unusually long one than for others, and `latency_s` at most. A piece runs when the time earned
is as long as recent pieces have taken; what is left over is kept for the next turn (a deficit round robin, Shreedhar
and Varghese 1995). Without requests training runs freely. No torch here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from softprompt.openmp import release_omp_threads

PATIENCE_S = 0.25  # how long a step waits for a training thread that reaches no yield point

_THREAD = threading.local()
_PIECE_DECAY = 0.98  # of the longest piece, per piece
_STEP_SMOOTHING = 0.05  # of the usual step, per step
_LENIENCE = 1.2  # times the usual step: a step that took longer earns training no more


def yield_point() -> None:
    """Call before a piece of work: waits while another thread computes. Does nothing in threads that share nothing."""
    pause: Callable[[], None] | None = getattr(_THREAD, "pause", None)
    if pause is not None:
        pause()


@contextmanager
def interrupted_by(check: Callable[[], None]) -> Iterator[None]:
    """Work in this thread that never waits: `yield_point` calls `check`, and what that raises ends the work there."""
    _THREAD.pause = check
    try:
        yield
    finally:
        _THREAD.pause = None


class ComputeShare:
    """Decides who computes: the engine's thread inside `inference_step`, or the training thread inside `training`."""

    def __init__(
        self,
        share: float = 0.46,
        latency_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`share` of the time is training's while requests are answered; `latency_s` at most before each step.

        A piece that is longer than that still runs once enough steps have earned its time.
        """
        self._ratio = share / (1 - share)
        self._latency_s = float("inf") if latency_s is None else latency_s
        self._clock = clock
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._has_requests = False
        self._is_stepping = False  # the engine computes
        self._is_training = False  # the training thread computes
        self._trainer_waits = False  # at a yield point
        self._trainer_unresponsive = False  # it has reached no yield point for longer than a step waits
        self._earned_s = 0.0  # what training may still use
        self._usual_step_s = 0.0  # what a step earns
        self._piece_s = 0.0  # what a piece takes: the longest of late
        self._piece_start = 0.0  # by the clock

    @contextmanager
    def inference_step(self) -> Iterator[None]:
        """One step of the engine. It begins when training has stopped, or has been unresponsive for too long."""
        with self._changed:
            self._has_requests = True
            if not self._trainer_unresponsive:
                has_stopped = self._changed.wait_for(lambda: not self._is_training, self._patience_s)
                self._trainer_unresponsive = not has_stopped
            self._is_stepping = True
        began = self._clock()
        try:
            yield
        finally:
            with self._changed:
                self._is_stepping = False
                self._earn(self._ratio * (self._clock() - began))
                if self._trainer_waits and self._may_train():
                    release_omp_threads()
                    self._resume_training()

    def idle(self) -> None:
        """The engine has nothing to do: training runs freely. Called in the engine's thread."""
        release_omp_threads()
        with self._changed:
            self._has_requests = False
            self._earned_s = 0.0
            self._resume_training()

    @contextmanager
    def training(self, on_resume: Callable[[], None] | None = None) -> Iterator[None]:
        """Training, in this thread: inside, `yield_point` waits for its turn.

        It then calls `on_resume`, and what that raises ends the training there.
        """
        _THREAD.pause = self._pause if on_resume is None else partial(self._pause_and_call, on_resume)
        self._piece_start = self._clock()
        self._pause()
        try:
            yield
        finally:
            _THREAD.pause = None
            with self._changed:
                self._stop_training()

    def _earn(self, seconds: float) -> None:
        """Time for training. At most one turn and one piece are saved up; a slow step is not made slower still."""
        self._usual_step_s += (_STEP_SMOOTHING if self._usual_step_s else 1.0) * (seconds - self._usual_step_s)
        turn = min(seconds, _LENIENCE * self._usual_step_s, self._latency_s)
        self._earned_s = min(self._earned_s + turn, turn + self._piece_s)

    def _pause(self) -> None:
        with self._changed:
            if self._is_training:
                self._charge(self._clock() - self._piece_start)
            self._trainer_waits = True
            self._resume_training()
            if self._trainer_waits:
                release_omp_threads()
                self._stop_training()
                self._changed.wait_for(lambda: not self._trainer_waits)
            self._trainer_unresponsive = False
            self._piece_start = self._clock()

    def _pause_and_call(self, on_resume: Callable[[], None]) -> None:
        self._pause()
        on_resume()

    def _charge(self, seconds: float) -> None:
        """A piece has ended."""
        if self._trainer_unresponsive:  # it was no piece of work: reading data, for example
            return
        self._piece_s = max(seconds, _PIECE_DECAY * self._piece_s)
        self._earned_s = max(self._earned_s - seconds, -self._piece_s)

    def _may_train(self) -> bool:
        return not self._has_requests or (not self._is_stepping and self._earned_s >= self._piece_s)

    def _resume_training(self) -> None:
        """Resume training if it is waiting and allowed to. The flag is set here: left to the training thread, the next
        engine step would win the race."""
        if self._trainer_waits and self._may_train():
            self._trainer_waits, self._is_training = False, True
            self._changed.notify_all()

    def _stop_training(self) -> None:
        self._is_training = False
        self._changed.notify_all()
