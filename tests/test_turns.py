"""Two threads on one machine: who computes when, by a clock that the test moves."""

import threading
import time
from contextlib import contextmanager

import pytest

from softprompt import turns as module
from softprompt.turns import Turns, breathe


@pytest.fixture
def patient(monkeypatch):
    """A thread that this machine leaves waiting is not one that does not breathe."""
    monkeypatch.setattr(module, "_PATIENCE_S", 30.0)


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Training:
    """A thread that works in pieces of so many seconds and writes down when."""

    def __init__(self, turns, clock, piece_s, log, num_pieces=10_000):
        self.turns, self.clock, self.piece_s, self.log, self.num_pieces = turns, clock, piece_s, log, num_pieces
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        with self.turns.second():
            for _ in range(self.num_pieces):
                breathe()
                if self.is_over.is_set():
                    return
                self.clock.now += self.piece_s
                self.log.append("piece")

    def end(self):
        self.is_over.set()
        self.turns.idle()
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def training(turns, clock, piece_s, log):
    found = Training(turns, clock, piece_s, log)
    found.thread.start()
    try:
        yield found
    finally:
        found.end()


def run_steps(turns, clock, log, count, step_s):
    for _ in range(count):
        with turns.first():
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


@pytest.mark.usefixtures("patient")
def test_training_gets_its_share_between_steps():
    clock, log = Clock(), []
    turns = Turns(share=0.5, clock=clock)
    with training(turns, clock, 0.010, log):
        run_steps(turns, clock, log, 200, 0.040)
    counts = pieces_between(log)
    assert 3.6 <= sum(counts[20:]) / len(counts[20:]) <= 4.1
    assert max(counts) <= 5


@pytest.mark.usefixtures("patient")
def test_a_small_share_is_small_and_a_piece_longer_than_it_still_runs():
    clock, log = Clock(), []
    turns = Turns(share=0.1, clock=clock)
    with training(turns, clock, 0.020, log):
        run_steps(turns, clock, log, 200, 0.040)
    counts = pieces_between(log)
    assert max(counts) == 1
    assert 0.17 <= sum(counts[20:]) / len(counts[20:]) <= 0.25  # 0.04 / 9 of 0.02: two ninths


@pytest.mark.usefixtures("patient")
def test_no_step_is_delayed_by_more_than_the_latency():
    clock, log = Clock(), []
    turns = Turns(share=0.9, latency_s=0.025, clock=clock)
    with training(turns, clock, 0.010, log):
        run_steps(turns, clock, log, 100, 0.040)
    counts = pieces_between(log)[20:]
    assert max(counts) <= 3 and sum(counts) / len(counts) <= 2.6


def test_training_runs_freely_without_requests():
    log = []
    turns = Turns()
    free = Training(turns, time.perf_counter, 0.0, log, num_pieces=1_000)
    free.clock = Clock()
    free.thread.start()
    free.thread.join(10)
    assert len(log) == 1_000


def test_steps_are_not_held_up_when_nothing_trains():
    turns = Turns()
    began = time.perf_counter()
    for _ in range(1_000):
        with turns.first():
            pass
    assert time.perf_counter() - began < 60  # a quarter of a second each would be 250
    breathe()  # outside of a training: nothing happens


def test_a_training_that_does_not_breathe_delays_one_step_only():
    turns, has_begun, may_end = Turns(), threading.Event(), threading.Event()

    def deaf():
        with turns.second():
            breathe()
            has_begun.set()
            may_end.wait(20)

    thread = threading.Thread(target=deaf, daemon=True)
    thread.start()
    has_begun.wait(10)
    began = time.perf_counter()
    for _ in range(100):
        with turns.first():
            pass
    assert time.perf_counter() - began < 10  # one wait of a quarter of a second; each waiting would be 25
    may_end.set()
    turns.idle()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.usefixtures("patient")
def test_an_error_in_a_step_lets_training_go_on():
    clock, log = Clock(), []
    turns = Turns(clock=clock)
    with training(turns, clock, 0.01, log):
        try:
            with turns.first():
                raise ValueError
        except ValueError:
            pass
        turns.idle()
        deadline = time.monotonic() + 10
        while len(log) < 50 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(log) >= 50
