"""Where the keys and values of running rows lie: stores of a few capacities, within a budget.

A row lies in the smallest store that it fits into and moves up when it outgrows it. A row that leaves is replaced by
the last one of its store, so that the rows in use are always the first ones. Knows nothing of requests or tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch

from softprompt.families import KVBuffer

_STEP = 64  # positions; a product over fewer is not faster
_PREPARED = 2  # capacities
_SMALL_PART = 8  # of the budget: an eighth
_GROWTH = 1.5  # from one capacity to the next, at most


@dataclass(eq=False)
class Place:
    """Where one row lies."""

    shelf: Shelf
    row: int
    length: int = 0  # positions that are held


class Shelf:
    """One store and who lies where in it."""

    def __init__(self, capacity: int) -> None:
        self.store = KVBuffer(0, capacity)
        self.places: list[Place] = []

    @property
    def num_positions(self) -> int:
        return self.store.num_rows * self.store.capacity

    def put(self) -> Place:
        assert len(self.places) < self.store.num_rows
        self.places.append(Place(self, len(self.places)))
        return self.places[-1]

    def take_out(self, place: Place) -> None:
        """The last row takes the place of the one that leaves. Nothing of it stays behind for the next one."""
        last, freed = self.places.pop(), len(self.places)
        if last is not place:
            self.store.clear(place.row)
            self.store.copy_row(freed, self.store, place.row, last.length)
            self.places[place.row] = last
            last.row = place.row
        self.store.clear(freed)


class KeyValueMemory:
    """The stores of one engine."""

    def __init__(self, budget_bytes: int, bytes_per_position: int, max_length: int) -> None:
        self.budget_positions = budget_bytes // bytes_per_position
        self.bytes_per_position = bytes_per_position
        self.capacities = capacities(max_length)
        self.shelves: dict[int, Shelf] = {}

    @property
    def num_bytes(self) -> int:
        """What the stores take, in use or not."""
        return self._num_positions() * self.bytes_per_position

    @property
    def num_bytes_in_use(self) -> int:
        places = (place for shelf in self.shelves.values() for place in shelf.places)
        return sum(place.shelf.store.capacity for place in places) * self.bytes_per_position

    def prepare(self, sample: KVBuffer, num_rows: int) -> None:
        """Take the memory of so many rows in the smallest stores now, where that is a small part of the budget.

        Memory that is taken in mid-answer holds a step up for as long as several take. `sample` knows the modules.
        """
        for capacity in self.capacities[:_PREPARED]:
            positions = self._num_positions() + num_rows * capacity
            if capacity not in self.shelves and positions <= self.budget_positions // _SMALL_PART:
                _prepare(self._shelf(capacity), sample, num_rows)

    def can_ever_hold(self, length: int) -> bool:
        """Whether one row of that many positions fits into the empty memory."""
        return self._capacity(length) <= self.budget_positions

    def place(self, length: int) -> Place | None:
        """A place for a row of `length` positions; None where there is no memory for it now."""
        shelf = self._shelf(self._capacity(length))
        return shelf.put() if self._has_room(shelf) else None

    def grow(self, place: Place, length: int) -> bool:
        """Make room for `length` positions in a row; False where there is no memory for it now."""
        if length <= place.shelf.store.capacity:
            return True
        moved = self.place(length)
        if moved is None:
            return False
        old = place.shelf
        old.store.copy_row(place.row, moved.shelf.store, moved.row, place.length)
        old.take_out(place)
        place.shelf, place.row = moved.shelf, moved.row
        place.shelf.places[place.row] = place
        return True

    def release(self, place: Place) -> None:
        place.shelf.take_out(place)

    def check_integrity(self) -> None:
        """Every place lies where its store says, and the budget holds. Raises AssertionError."""
        assert self._num_positions() <= self.budget_positions
        for shelf in self.shelves.values():
            for row, place in enumerate(shelf.places):
                assert place.shelf is shelf and place.row == row and place.length <= shelf.store.capacity
            assert len(shelf.places) <= shelf.store.num_rows

    def _capacity(self, length: int) -> int:
        return self.capacities[bisect_left(self.capacities, length)]

    def _shelf(self, capacity: int) -> Shelf:
        if capacity not in self.shelves:
            self.shelves[capacity] = Shelf(capacity)
        return self.shelves[capacity]

    def _num_positions(self) -> int:
        return sum(shelf.num_positions for shelf in self.shelves.values())

    def _has_room(self, shelf: Shelf) -> bool:
        """Make a free row in a store: doubled where the budget allows, else one more, at the cost of unused rows."""
        used, rows = len(shelf.places), shelf.store.num_rows
        if used < rows:
            return True
        for wanted in (max(1, 2 * rows), rows + 1):
            if self._num_positions() + (wanted - rows) * shelf.store.capacity <= self.budget_positions:
                return _resized(shelf.store, wanted)
        return self._take_from_others(shelf)

    def _take_from_others(self, shelf: Shelf) -> bool:
        for other in self.shelves.values():
            if other is not shelf and other.store.num_rows > len(other.places):
                _resized(other.store, len(other.places))
        if self._num_positions() + shelf.store.capacity > self.budget_positions:
            return False
        return _resized(shelf.store, shelf.store.num_rows + 1)


def _prepare(shelf: Shelf, sample: KVBuffer, num_rows: int) -> None:
    """Nothing where the machine has less memory than the budget allows."""
    try:
        shelf.store = sample.like(num_rows, shelf.store.capacity)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise


def _resized(store: KVBuffer, num_rows: int) -> bool:
    """False where the machine has less memory than the budget allows."""
    try:
        store.resize(num_rows)
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
