"""Keys and values of the running sequences: slots in buffers of a few capacities, within a budget.

A sequence has a slot in the smallest bucket that it fits into and moves to a larger one when it outgrows it. When a
slot is freed, the last row of its buffer moves into it, so that the rows in use are always the first ones. Knows
nothing of requests or tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch

from softprompt.families import KVBuffer

_STEP = 64  # positions; a product over fewer is not faster
_NUM_PREALLOCATED = 2  # capacities
_SMALL_PART = 8  # of the budget: an eighth
_GROWTH = 1.5  # from one capacity to the next, at most


@dataclass(eq=False)
class Slot:
    """The row of a buffer that one sequence has."""

    bucket: CapacityBucket
    row: int
    length: int = 0  # positions whose keys and values are there


class CapacityBucket:
    """One buffer and its slots, in the order of its rows."""

    def __init__(self, capacity: int) -> None:
        self.buffer = KVBuffer(0, capacity)
        self.slots: list[Slot] = []

    @property
    def num_positions(self) -> int:
        return self.buffer.num_rows * self.buffer.capacity

    def allocate(self) -> Slot:
        assert len(self.slots) < self.buffer.num_rows
        self.slots.append(Slot(self, len(self.slots)))
        return self.slots[-1]

    def free(self, slot: Slot) -> None:
        """The last row moves into the freed one. Nothing stays behind for the next sequence."""
        last, freed = self.slots.pop(), len(self.slots)
        if last is not slot:
            self.buffer.clear(slot.row)
            self.buffer.copy_row(freed, self.buffer, slot.row, last.length)
            self.slots[slot.row] = last
            last.row = slot.row
        self.buffer.clear(freed)


class KVCache:
    """The buffers of one engine; of an encoder-decoder there are two caches within one budget, its own and cross."""

    def __init__(
        self, budget_bytes: int, bytes_per_position: int, max_length: int, partner: KVCache | None = None
    ) -> None:
        """`partner` shares the budget; its positions take as many bytes."""
        self.partner = partner
        if partner is not None:
            partner.partner = self
        self.budget_positions = budget_bytes // bytes_per_position
        self.bytes_per_position = bytes_per_position
        self.capacities = capacities(max_length)
        self.buckets: dict[int, CapacityBucket] = {}

    @property
    def slots(self) -> list[Slot]:
        """All that are allocated."""
        return [slot for bucket in self.buckets.values() for slot in bucket.slots]

    @property
    def num_bytes(self) -> int:
        """Size of all buffers, in use or not; the partner's too."""
        return self._num_positions() * self.bytes_per_position

    @property
    def num_bytes_in_use(self) -> int:
        used = sum(len(bucket.slots) * bucket.buffer.capacity for bucket in self._buckets_in_budget())
        return used * self.bytes_per_position

    def preallocate(self, sample: KVBuffer, num_rows: int) -> None:
        """Make `num_rows` rows in the smallest buckets now, where that is a small part of the budget.

        Memory that is allocated in mid-answer delays a step as long as several take. `sample` has the attention
        modules.
        """
        for capacity in self.capacities[:_NUM_PREALLOCATED]:
            positions = self._num_positions() + num_rows * capacity
            if capacity not in self.buckets and positions <= self.budget_positions // _SMALL_PART:
                _preallocate(self._bucket(capacity), sample, num_rows)

    def can_ever_fit(self, *lengths: int) -> bool:
        """Whether one sequence of that many positions, here and at the partner, fits into the empty cache.

        Any thread may ask.
        """
        return sum(self.capacities[bisect_left(self.capacities, length)] for length in lengths) <= self.budget_positions

    def allocate(self, length: int) -> Slot | None:
        """A slot for `length` positions; None where there is no memory for it now."""
        bucket = self._bucket(self.capacities[bisect_left(self.capacities, length)])
        return bucket.allocate() if self._has_free_row(bucket) else None

    def grow(self, slot: Slot, length: int) -> bool:
        """Extend a slot to `length` positions; False where there is no memory for it now."""
        if length <= slot.bucket.buffer.capacity:
            return True
        larger = self.allocate(length)
        if larger is None:
            return False
        old = slot.bucket
        old.buffer.copy_row(slot.row, larger.bucket.buffer, larger.row, slot.length)
        old.free(slot)
        slot.bucket, slot.row = larger.bucket, larger.row
        slot.bucket.slots[slot.row] = slot
        return True

    def free(self, slot: Slot) -> None:
        slot.bucket.free(slot)

    def check_integrity(self) -> None:
        """Every slot is the row that it names, and the budget is kept. Raises AssertionError."""
        assert self._num_positions() <= self.budget_positions
        for bucket in self.buckets.values():
            for row, slot in enumerate(bucket.slots):
                assert slot.bucket is bucket and slot.row == row and slot.length <= bucket.buffer.capacity
            assert len(bucket.slots) <= bucket.buffer.num_rows

    def _bucket(self, capacity: int) -> CapacityBucket:
        if capacity not in self.buckets:
            self.buckets[capacity] = CapacityBucket(capacity)
        return self.buckets[capacity]

    def _buckets_in_budget(self) -> list[CapacityBucket]:
        others = [] if self.partner is None else self.partner.buckets.values()
        return [*self.buckets.values(), *others]

    def _num_positions(self) -> int:
        return sum(bucket.num_positions for bucket in self._buckets_in_budget())

    def _has_free_row(self, bucket: CapacityBucket) -> bool:
        """Make one where needed: twice as many rows where the budget allows, else one more, taken from unused rows."""
        used, rows = len(bucket.slots), bucket.buffer.num_rows
        if used < rows:
            return True
        for wanted in (max(1, 2 * rows), rows + 1):
            if self._num_positions() + (wanted - rows) * bucket.buffer.capacity <= self.budget_positions:
                return _resized(bucket.buffer, wanted)
        return self._take_from_others(bucket)

    def _take_from_others(self, bucket: CapacityBucket) -> bool:
        for other in self._buckets_in_budget():
            if other is not bucket and other.buffer.num_rows > len(other.slots):
                _resized(other.buffer, len(other.slots))
        if self._num_positions() + bucket.buffer.capacity > self.budget_positions:
            return False
        return _resized(bucket.buffer, bucket.buffer.num_rows + 1)


def _preallocate(bucket: CapacityBucket, sample: KVBuffer, num_rows: int) -> None:
    """Does nothing where the machine has less memory than the budget allows."""
    try:
        bucket.buffer = sample.like(num_rows, bucket.buffer.capacity)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise


def _resized(buffer: KVBuffer, num_rows: int) -> bool:
    """False where the machine has less memory than the budget allows."""
    try:
        buffer.resize(num_rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: Exception) -> bool:
    """torch has no class of its own for it on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def capacities(max_length: int) -> list[int]:
    """Multiples of 64, from one to the next at most half as much again, up to `max_length`."""
    found = [_STEP]
    while found[-1] < max_length:
        found.append(max(found[-1] + _STEP, int(found[-1] * _GROWTH) // _STEP * _STEP))
    return [*(capacity for capacity in found if capacity < max_length), max_length]
