"""Keys and values stay what they were written as, wherever rows are moved, within the budget and nowhere else."""

from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support.engine_runs import free_without_copying
from support.tiny_bases import random_ids
from torch import nn

from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import Engine, Request
from softprompt.engine.kv_cache import CapacityBucket, KVCache, capacities
from softprompt.families import KVBuffer

MODULES = [nn.Identity(), nn.Identity()]
SHAPES = [(2, 3), (1, 5)]  # key heads and their width, of each module
BYTES = sum(2 * 4 * heads * width for heads, width in SHAPES)  # of one position
MOST = 300  # positions of a row
BUDGET = 700


class Memory(RuleBasedStateMachine):
    """Rows that come, are written to, grow and go, beside a plain dict of what was written."""

    def __init__(self):
        super().__init__()
        self.memory = KVCache(BUDGET * BYTES + 7, BYTES, MOST)
        self.written = {}  # place -> keys and values [k, length, d] of each module
        self.next_value = 1.0

    @rule(length=st.integers(1, MOST))
    def place(self, length):
        place = self.memory.allocate(length)
        assert (place is not None) == self._has_room(length)
        if place is not None:
            assert place.length == 0 and place.bucket.buffer.capacity == capacity_of(length)
            self.written[place] = [[torch.zeros(k, 0, d)] * 2 for k, d in SHAPES]

    @precondition(lambda self: self.written)
    @rule(which=st.integers(0, 99), count=st.integers(1, 80))
    def write(self, which, count):
        """As a forward does: new positions behind those that are there."""
        place, own = self._pick(which)
        first, last = place.length, min(place.length + count, place.bucket.buffer.capacity)
        for module, shape, pair in zip(MODULES, SHAPES, own, strict=True):
            new = [self._new(shape[0], last - first, shape[1]) for _ in pair]
            held = place.bucket.buffer.of(module, *(part.transpose(0, 1) for part in new))
            for number, part in enumerate(new):
                held[number][place.row, :, first:last] = part
                pair[number] = torch.cat([pair[number], part], dim=1)
        place.length = last

    @precondition(lambda self: self.written)
    @rule(which=st.integers(0, 99), length=st.integers(1, MOST))
    def grow(self, which, length):
        place, _ = self._pick(which)
        capacity = place.bucket.buffer.capacity
        expected = length <= capacity or self._has_room(length)
        assert self.memory.grow(place, length) == expected
        assert place.bucket.buffer.capacity == (max(capacity, capacity_of(length)) if expected else capacity)

    @precondition(lambda self: self.written)
    @rule(which=st.integers(0, 99))
    def release(self, which):
        place, _ = self._pick(which)
        self.memory.free(place)
        del self.written[place]

    @invariant()
    def everything_is_where_it_was_written(self):
        self.memory.check_integrity()
        for place, own in self.written.items():
            if place.length:
                states = place.bucket.buffer.read(place.row, place.length)
                for module, pair in zip(MODULES, own, strict=True):
                    assert all(torch.equal(*both) for both in zip(states[module], pair, strict=True))

    @invariant()
    def the_budget_holds_and_nothing_is_left_behind(self):
        stores = [bucket.buffer for bucket in self.memory.buckets.values()]
        pairs = [(store, part) for store in stores for pair in store.tensors.values() for part in pair]
        assert sum(part.numel() * 4 for _, part in pairs) <= self.memory.num_bytes <= BUDGET * BYTES
        assert self.memory.num_bytes_in_use == sum(p.bucket.buffer.capacity for p in self.written) * BYTES
        for bucket in self.memory.buckets.values():
            free = [part[len(bucket.slots) :] for pair in bucket.buffer.tensors.values() for part in pair]
            assert not any(part.any() for part in free)

    def _pick(self, which):
        return list(self.written.items())[which % len(self.written)]

    def _has_room(self, length):
        """By the budget and what is in use alone: free rows elsewhere are no obstacle."""
        return sum(place.bucket.buffer.capacity for place in self.written) + capacity_of(length) <= BUDGET

    def _new(self, *shape):
        """Numbers that were never there before."""
        count = shape[0] * shape[1] * shape[2]
        self.next_value += count
        return torch.arange(self.next_value - count, self.next_value).view(shape)


def capacity_of(length):
    return next(capacity for capacity in [64, 128, 192, 256, 300] if length <= capacity)


def test_every_position_is_read_back_after_any_moves():
    run_state_machine_as_test(Memory)


def test_a_row_that_was_not_copied_makes_the_machine_fail(monkeypatch):
    """The control: whoever takes the place of the one that leaves has to bring what it holds."""

    monkeypatch.setattr(CapacityBucket, "free", free_without_copying)
    quickly = settings(phases=[Phase.generate], report_multiple_bugs=False, database=None, deadline=None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Memory, settings=quickly)


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_capacities_waste_at_most_a_half_or_64_positions(max_length, length):
    found = capacities(max_length)
    assert found[-1] == max_length and found == sorted(set(found))
    assert all(capacity % 64 == 0 for capacity in found[:-1])
    assert found[0] <= 64
    assert all(after <= max(before + 64, 1.5 * before) for before, after in pairwise(found))
    if length <= max_length:
        memory = KVCache(10**12, 1, max_length)
        assert memory.can_ever_fit(length)
        assert KVCache(length - 1, 1, max_length).can_ever_fit(length) is False


def test_nan_of_a_freed_slot_does_not_reach_the_next_sequence():
    memory = KVCache(1_000 * BYTES, BYTES, MOST)
    first, second = memory.allocate(10), memory.allocate(10)
    keys, values = first.bucket.buffer.of(MODULES[0], torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    keys[first.row], values[first.row], first.length = torch.nan, torch.inf, 10
    memory.free(first)
    assert torch.isfinite(keys).all() and torch.isfinite(values).all()
    assert second.row == 0


@pytest.mark.parametrize("is_ready", [True, False])
def test_an_engine_with_preallocated_memory_allocates_none_while_short_answers_grow(tiny_llama, monkeypatch, is_ready):
    resized = []
    resize = KVBuffer.resize
    monkeypatch.setattr(KVBuffer, "resize", lambda store, rows: resized.append(rows) or resize(store, rows))
    engine = Engine(tiny_llama, EngineConfig(max_rows=5), arrange=is_ready)
    held = engine.runners.kv_cache.num_bytes
    for seed in range(5):
        engine.add(Request(tuple(random_ids(40, seed)), sampling=SamplingConfig(max_new_tokens=40, ignore_eos=True)))
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert bool(resized) != is_ready
    assert (held > 0) == is_ready and engine.runners.kv_cache.num_bytes >= held


def test_memory_is_preallocated_where_it_is_a_small_part_of_the_budget():
    sample = KVBuffer(1, 1)
    sample.of(MODULES[0], torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    memory = KVCache(64 * 8 * 4 * BYTES, BYTES, 300)
    memory.preallocate(sample, 4)
    assert {capacity: bucket.buffer.num_rows for capacity, bucket in memory.buckets.items()} == {64: 4}
    assert memory.buckets[64].buffer.tensors[MODULES[0]][0].shape == (4, 2, 64, 3)
    assert memory.num_bytes == 4 * 64 * BYTES and memory.num_bytes_in_use == 0
    memory.check_integrity()
    small = KVCache(64 * 8 * 4 * BYTES - 1, BYTES, 300)
    small.preallocate(sample, 4)
    assert small.num_bytes == 0


def test_preallocation_stops_where_the_machine_has_no_memory(monkeypatch):
    sample = KVBuffer(1, 1)
    sample.of(MODULES[0], torch.ones(1, 2, 3), torch.ones(1, 2, 3))

    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    memory = KVCache(64 * 8 * 4 * BYTES, BYTES, 300)
    monkeypatch.setattr(KVBuffer, "like", refuse)
    memory.preallocate(sample, 4)
    assert memory.num_bytes == 0
    monkeypatch.undo()
    assert memory.allocate(10) is not None
    memory.check_integrity()
