"""Which of two threads computes when, by a clock that the test moves."""

import threading
import time
from contextlib import contextmanager

from softprompt.compute_share import ComputeShare, yield_point

PATIENT = {"patience_s": 30.0}  # a thread that this machine leaves waiting is not unresponsive


class Clock:
    """A clock that moves only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Training:
    """A training thread whose pieces take `piece_s` each and are written to a log."""

    def __init__(self, compute_share, clock, piece_s, log, num_pieces=10**7):
        self.compute_share, self.clock = compute_share, clock
        self.piece_s, self.log, self.num_pieces = piece_s, log, num_pieces
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        with self.compute_share.training():
            for _ in range(self.num_pieces):
                yield_point()
                if self.is_over.is_set():
                    return
                self.clock.now += self.piece_s
                self.log.append("piece")

    def end(self):
        self.is_over.set()
        self.compute_share.idle()
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def training(compute_share, clock, piece_s, log):
    found = Training(compute_share, clock, piece_s, log)
    found.thread.start()
    try:
        yield found
    finally:
        found.end()


def run_steps(compute_share, clock, log, count, step_s):
    for _ in range(count):
        with compute_share.inference_step():
            clock.now += step_s
            log.append("step")
            time.sleep(0.0005)  # a training that did not wait would show here


def pieces_between(log):
    """How many pieces ran in front of each step but the first."""
    counts, count = [], 0
    for word in log[log.index("step") + 1 :]:
        if word == "step":
            counts.append(count)
            count = 0
        else:
            count += 1
    return counts


def test_training_gets_its_share_of_the_time_between_steps():
    clock, log = Clock(), []
    compute_share = ComputeShare(share=0.5, clock=clock, **PATIENT)
    with training(compute_share, clock, 0.010, log):
        run_steps(compute_share, clock, log, 200, 0.040)
    counts = pieces_between(log)
    assert 3.6 <= sum(counts[20:]) / len(counts[20:]) <= 4.1
    assert max(counts) <= 5


def test_a_piece_longer_than_a_small_share_runs_once_enough_steps_have_earned_it():
    clock, log = Clock(), []
    compute_share = ComputeShare(share=0.1, clock=clock, **PATIENT)
    with training(compute_share, clock, 0.020, log):
        run_steps(compute_share, clock, log, 200, 0.040)
    counts = pieces_between(log)
    assert max(counts) == 1
    assert 0.17 <= sum(counts[20:]) / len(counts[20:]) <= 0.25  # 0.04 / 9 of 0.02: two ninths


def test_training_before_a_step_takes_no_longer_than_the_latency():
    clock, log = Clock(), []
    compute_share = ComputeShare(share=0.9, latency_s=0.025, clock=clock, **PATIENT)
    with training(compute_share, clock, 0.010, log):
        run_steps(compute_share, clock, log, 100, 0.040)
    counts = pieces_between(log)[20:]
    assert max(counts) <= 3 and sum(counts) / len(counts) <= 2.6


def test_training_without_requests_never_waits():
    log = []
    compute_share = ComputeShare()
    free = Training(compute_share, time.perf_counter, 0.0, log, num_pieces=1_000)
    free.clock = Clock()
    free.thread.start()
    free.thread.join(10)
    assert len(log) == 1_000


def test_steps_without_a_training_never_wait():
    compute_share = ComputeShare()
    began = time.perf_counter()
    for _ in range(1_000):
        with compute_share.inference_step():
            pass
    assert time.perf_counter() - began < 60  # a quarter of a second each would be 250
    yield_point()  # outside of a training: nothing happens


def test_a_training_without_yield_points_delays_one_step_only():
    compute_share, has_begun, may_end = ComputeShare(), threading.Event(), threading.Event()

    def unresponsive():
        with compute_share.training():
            yield_point()
            has_begun.set()
            may_end.wait(20)

    thread = threading.Thread(target=unresponsive, daemon=True)
    thread.start()
    has_begun.wait(10)
    began = time.perf_counter()
    for _ in range(100):
        with compute_share.inference_step():
            pass
    assert time.perf_counter() - began < 10  # one wait of a quarter of a second; each waiting would be 25
    may_end.set()
    compute_share.idle()
    thread.join(10)
    assert not thread.is_alive()


def test_training_goes_on_after_an_error_in_a_step():
    clock, log = Clock(), []
    compute_share = ComputeShare(clock=clock, **PATIENT)
    with training(compute_share, clock, 0.01, log):
        try:
            with compute_share.inference_step():
                raise ValueError
        except ValueError:
            pass
        compute_share.idle()
        deadline = time.monotonic() + 10
        while len(log) < 50 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(log) >= 50
