"""Twenty thousand requests under a thousand soft prompts, many given up or late: nothing grows, and every id ends."""

import ctypes
import gc
import random
import time
from collections import Counter

import psutil
import pytest
from support.engine_runs import Ledger, assert_empty, kv_bytes
from support.tiny_bases import build_base, random_prompt
from torch import Tensor

from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import Engine, Request
from softprompt.engine.logits_processors import SamplingState
from softprompt.engine.sequence import RequestState, Sequence
from softprompt.prompt import SoftPrompt

NUM_PROMPTS = 1_000
MOST_AT_ONCE = 100
FEW_BYTES = 6 * 2**20  # the beginnings that are remembered, and gaps of the heap; a row kept per request would be 50


def random_request(chance, prompts, beginnings):
    """Mostly short ones, a quarter with a common beginning, some drawn, some in a hurry."""
    text = chance.choice(beginnings) if chance.random() < 0.25 else ()
    text += tuple(chance.randrange(3, 97) for _ in range(chance.randint(1, 20)))
    sampling = SamplingConfig(
        max_new_tokens=chance.randint(1, 30), temperature=chance.choice([0, 0, 1.0]), seed=chance.randrange(2**40),
        repetition_penalty=chance.choice([1.0, 1.2]), stop=chance.choice([(), ("w5",)]), ignore_eos=True,
    )  # fmt: skip
    return Request(
        text, chance.choice([None, *prompts]), sampling, num_choices=chance.choice([1, 1, 1, 1, 2]),
        client=chance.choice([None, *(f"client {number}" for number in range(50))]),
        priority=chance.choice([0, 0, 1]), timeout_s=chance.choice([None, None, None, 1.0, 20.0]),
    )  # fmt: skip


def num_rows():
    """Rows, and what belongs to each, that are alive in this process."""
    return sum(isinstance(each, Sequence | RequestState | SamplingState) for each in gc.get_objects())


def give_free_memory_back():
    """To the system; glibc's allocator would keep some of it, and it would look like ours."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Soak:
    """An engine under load; the clock advances by 50 ms a step."""

    def __init__(self, base, seed=0):
        self.chance, self.now, self.ledger = random.Random(seed), 0.0, Ledger()
        self.prompts = [SoftPrompt(random_prompt(base, 1 + number % 20, number)) for number in range(NUM_PROMPTS)]
        self.beginnings = [tuple(range(3 + number, 38 + number)) for number in range(20)]
        config = EngineConfig(kv_bytes=kv_bytes(base, 2_200), prefix_bytes=kv_bytes(base, 2_000))
        self.engine = Engine(base, config, clock=lambda: self.now)
        self.alive, self.num_added, self.num_steps = {}, 0, 0

    def run_until(self, num_added):
        while self.num_added < num_added or self.engine.has_work:
            for _ in range(self.chance.randint(0, 8)):
                if self.num_added < num_added and len(self.alive) < MOST_AT_ONCE:
                    self.alive[self.engine.add(random_request(self.chance, self.prompts, self.beginnings))] = None
                    self.num_added += 1
            if self.alive and self.chance.random() < 0.2:
                self.engine.abort(self.chance.choice(list(self.alive)))
            self.step()
        assert_empty(self.engine)

    def step(self):
        self.now += 0.05
        self.num_steps += 1
        events = self.engine.step()
        self.ledger.record(events)
        for number in {event.request for event in events if event.request in self.ledger.ends}:
            self.ledger.ends[number] = type(self.ledger.ends[number])  # what it said would fill the memory
            del self.alive[number]
        if self.num_steps % 50 == 0:
            self.engine.check_integrity()

    def sizes(self):
        gc.collect()
        num_tensors = sum(type(each) is Tensor for each in gc.get_objects())
        give_free_memory_back()
        stats = self.engine.stats()
        return {
            "tensors": num_tensors,
            "rows": num_rows(),
            "resident": psutil.Process().memory_info().rss,
            "kv_bytes": stats.kv_bytes,
            "prefix_bytes": stats.prefix_bytes,
        }


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_after_twenty_thousand_requests_the_engine_is_as_large_as_after_ten_thousand():
    start, soak = time.monotonic(), Soak(build_base("llama", max_position_embeddings=128))
    soak.run_until(10_000)
    half = soak.sizes()
    soak.run_until(20_000)
    whole, stats = soak.sizes(), soak.engine.stats()
    print(f"\n{time.monotonic() - start:.0f} s\n{half}\n{whole}\n{Counter(soak.ledger.ends.values())}\n{stats}")
    assert sorted(soak.ledger.ends) == list(range(20_000)) and not soak.alive
    assert stats.num_finished + stats.num_aborted == 20_000 and stats.num_failed == 0
    assert min(stats.num_finished, stats.num_aborted, stats.num_preemptions, stats.num_prefix_hits) > 100
    assert whole["resident"] - half["resident"] < FEW_BYTES
    assert whole["kv_bytes"] <= soak.engine.config.kv_bytes
    assert whole["prefix_bytes"] <= soak.engine.config.prefix_bytes
    assert whole["rows"] == half["rows"]
    assert whole["tensors"] - half["tensors"] < 100


def test_sequences_that_have_ended_are_freed_without_the_garbage_collector():
    """Rows and requests knew each other, and stayed with their texts until the collector came by."""
    soak = Soak(build_base("llama", max_position_embeddings=128), seed=2)
    gc.collect()
    before = num_rows()
    gc.disable()
    try:
        soak.run_until(40)
        assert num_rows() <= before  # those of other tests
    finally:
        gc.enable()


def test_a_short_soak_ends_every_id_once():
    soak = Soak(build_base("bloom"), seed=1)
    soak.run_until(150)
    assert sorted(soak.ledger.ends) == list(range(150))
