"""Anything that a crowd may do to an engine, in any order: every id ends once, and nothing is held behind."""

from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.engine_runs import Ledger, assert_text_true, assert_true, kv_bytes, run_out, samplings
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import Aborted, Engine, Finished, Request
from softprompt.errors import QueueFullError
from softprompt.prompt import SoftPrompt

MAX_WAITING = 10
MOST_POSITIONS = 200  # of a row, and of the memory


@lru_cache
def base_of(family):
    return build_base(family, **({"max_position_embeddings": MOST_POSITIONS} if family == "llama" else {}))


@lru_cache
def prompts_of(family):
    base = base_of(family)
    return [None, *(SoftPrompt(random_prompt(base, length, seed=length)) for length in (2, 9, 20, 40))]


def texts():
    """New ones, and some that begin as others do."""
    new = st.integers(1, 60).map(lambda length: random_ids(length, length))
    known = st.tuples(st.sampled_from([40, 55]), st.integers(1, 9)).map(lambda n: random_ids(n[0]) + random_ids(n[1]))
    return new | known


def requests():
    """The number of a soft prompt, and all else."""
    return st.tuples(
        st.integers(0, 4),
        st.fixed_dictionaries(
            {
                "ids": texts(),
                "sampling": samplings(),
                "num_choices": st.sampled_from([1, 1, 1, 3]),
                "num_log_probs": st.sampled_from([None, 0, 2]),
                "num_text_log_probs": st.sampled_from([None, None, 0, 2]),
                "is_text_only": st.sampled_from([False] * 7 + [True]),
                "client": st.sampled_from([None, "a", "b"]),
                "priority": st.sampled_from([0, 0, 0, -1, 1]),
                "timeout_s": st.sampled_from([None] * 6 + [0.0, 1.0, 5.0]),
            }
        ),
    )


class Crowd(RuleBasedStateMachine):
    """One engine with little memory, a clock that moves when told, and everybody's wishes."""

    family, runner = "llama", "auto"
    num_preemptions = num_finished = num_aborted = num_hits = 0  # over all examples of a run

    def __init__(self):
        super().__init__()
        self.base, self.now, self.ledger = base_of(self.family), 0.0, Ledger()
        config = EngineConfig(
            max_rows=5, max_step_tokens=8, max_waiting=MAX_WAITING,
            kv_bytes=kv_bytes(self.base, MOST_POSITIONS), prefix_bytes=kv_bytes(self.base, 100),
        )  # fmt: skip
        self.engine = Engine(self.base, config, runner=self.runner, clock=lambda: self.now)
        self.admitted, self.asked, self.deadlines = {}, set(), {}

    @initialize(coming=st.lists(requests(), min_size=6, max_size=MAX_WAITING))
    def begin(self, coming):
        """More than the memory holds at once."""
        self.add(coming)

    @rule(coming=st.lists(requests(), min_size=1, max_size=3))
    def add(self, coming):
        for number, wishes in coming:
            self._add(Request(prompt=prompts_of(self.family)[number], **wishes))

    def _add(self, request):
        try:
            admitted = self.engine.add(request)
        except QueueFullError:
            assert self.engine.stats().num_waiting >= MAX_WAITING
            return
        self.admitted[admitted] = request
        if request.timeout_s is not None:
            self.deadlines[admitted] = self.now + request.timeout_s

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            events = self.engine.step()
            self.ledger.record(events)
            assert all(self.deadlines.get(event.request, self.now + 1) > self.now or isinstance(event, Aborted)
                       for event in events)  # fmt: skip
            self.engine.check_integrity()

    @precondition(lambda self: self.admitted)
    @rule(which=st.floats(0, 1))
    def abort(self, which):
        """Those that have ended, and one that never was, too."""
        number = int(which * len(self.admitted))
        self.asked.add(number)
        self.engine.abort(number)

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def is_sound(self):
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert stats.num_finished + stats.num_aborted + stats.num_failed == len(self.ledger.ends)
        for bucket in self.engine.runners.kv_cache.buckets.values():
            for pair in bucket.buffer.tensors.values():
                assert not any(part[len(bucket.slots) :].any() for part in pair), "something was left behind"

    def teardown(self):
        run_out(self.engine, self.ledger)
        assert set(self.ledger.ends) == set(self.admitted)
        for number, end in self.ledger.ends.items():
            if isinstance(end, Aborted):
                assert number in (self.asked if end.reason == "asked" else self.deadlines)
                continue
            assert isinstance(end, Finished)
            self._check(self.admitted[number], end)
        self._count()

    def _check(self, request, end):
        assert len(end.answers) == request.num_choices
        assert (end.request in self.ledger.texts) == (request.num_text_log_probs is not None)
        if request.num_text_log_probs is not None:
            assert_text_true(self.base, request, self.ledger.texts[end.request])
        if request.is_text_only:
            assert all(not answer.ids for answer in end.answers)
            return
        plain = SamplingConfig(max_new_tokens=request.sampling.max_new_tokens, ignore_eos=request.sampling.ignore_eos)
        if replace(request.sampling, seed=0) == plain and request.num_log_probs is not None:
            assert_true(self.base, request, end.answers[0])

    def _count(self):
        stats = self.engine.stats()
        type(self).num_preemptions += stats.num_preemptions
        type(self).num_finished += stats.num_finished
        type(self).num_aborted += stats.num_aborted
        type(self).num_hits += stats.num_prefix_hits


def run_crowd(family, num_examples, num_rules, runner="auto"):
    """Over all examples everything has to have happened."""
    crowd = type("CrowdOf" + family, (Crowd,), {"family": family, "runner": runner})
    chosen = settings(
        max_examples=num_examples, stateful_step_count=num_rules, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(crowd, settings=chosen)
    print(family, {name: getattr(crowd, name) for name in vars(Crowd) if name.startswith("num_")})
    assert min(crowd.num_preemptions, crowd.num_finished, crowd.num_aborted, crowd.num_hits) > 0


def test_after_any_commands_every_id_has_ended_once_and_nothing_is_left():
    run_crowd("llama", num_examples=15, num_rules=25)


@pytest.mark.medium
def test_after_any_commands_without_the_compiled_attention_every_id_has_ended_once():
    run_crowd("bloom", num_examples=30, num_rules=25, runner="torch")


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_after_very_many_commands_every_id_has_ended_once_and_nothing_is_left(family):
    run_crowd(family, num_examples=150, num_rules=60)
