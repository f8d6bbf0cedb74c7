"""Rows of any length and soft prompt in one forward, over keys and values that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.engine.memory import KeyValueMemory
from softprompt.engine.prefixes import Key, Prefix, PrefixCache
from softprompt.engine.rows import Ran, Row
from softprompt.families import Forward, Piece, held_rows, in_order, is_native
from softprompt.splice import Stretch, splice_stretches

_WORTH_WAITING = 32  # positions of a beginning: computing fewer twice is quicker than waiting a step for them


class HeldRunner:
    """The fast way: a `Runner` over `KeyValueMemory`, with the beginnings of rows in a `PrefixCache`."""

    reads_in_pieces = True

    def __init__(self, base: Base, forward: Forward, memory: KeyValueMemory, prefixes: PrefixCache) -> None:
        self.base = base
        self.forward = forward
        self.memory = memory
        self.prefixes = prefixes
        self._promised: dict[Key, Row] = {}
        self._has_light = is_native(base.device, base.dtype)

    def can_ever_hold(self, length: int) -> bool:
        return self.memory.can_ever_hold(length)

    def is_worth_waiting(self, row: Row) -> bool:
        """The longest beginning that somebody computes now, unless a longer one is there already."""
        for length, key in reversed(_useful(row)):
            if key in self.prefixes:
                return False
            if key in self._promised and length >= _WORTH_WAITING:
                return True
        return False

    def start(self, row: Row) -> bool:
        place = self.memory.place(row.length + 1)
        if place is None:
            return False
        row.place = place
        keys = _useful(row)
        row.prefix = self.prefixes.pin([key for _, key in reversed(keys)]) if keys else None
        if row.prefix is not None:
            row.computed = min(row.prefix.length, row.most_taken)
            place.shelf.store.write(place.row, row.prefix.states, row.computed)
            place.length = row.computed
        if row.num_cached is None:  # what a preempted row finds again is its own
            row.num_cached = row.computed
        self._promise(row)
        return True

    def make_room(self, row: Row) -> bool:
        assert row.place is not None
        return self.memory.grow(row.place, row.length + 1)

    def stop(self, row: Row) -> None:
        assert row.place is not None
        self.memory.release(row.place)
        if row.prefix is not None:
            self.prefixes.unpin(row.prefix)
        for _, key in row.promises:
            self._promised.pop(key, None)
        row.place, row.prefix, row.computed, row.promises = None, None, 0, []

    def run(self, pieces: Sequence[tuple[Row, int]]) -> Ran:
        placed = [_piece(row, count) for row, count in pieces]
        order = in_order(placed)
        stretches = [_stretch(*pieces[number]) for number in order]
        held = held_rows([placed[number] for number in order], self.base.device, self._has_light)
        hidden = self.forward.packed_hidden_states(*splice_stretches(self.base, stretches), held)
        ends = _ends(placed, order)
        telling = [
            (row, hidden[int(ends[number]) + 1 - count :][row.telling(count)])
            for number, (row, count) in enumerate(pieces)
            if row.is_reporting
        ]
        for row, count in pieces:
            row.computed += count
            assert row.place is not None
            row.place.length = row.computed
            if row.promises:
                self._keep_promises(row)
        return Ran(hidden[ends.to(hidden.device)], telling)

    def _promise(self, row: Row) -> None:
        """What the row will leave to others: its soft prompt, and the longest beginning that was asked for before."""
        wanted = [(length, key) for length, key in row.keys if length == row.num_virtual]
        texts = [(length, key) for length, key in row.keys if length > row.num_virtual]
        seen = [pair for pair in texts if self.prefixes.was_seen(pair[1])]
        wanted += seen[-1:]
        row.promises = [pair for pair in wanted if pair[0] > row.computed and self._is_wanted(*pair)]
        self._promised.update((key, row) for _, key in row.promises)

    def _is_wanted(self, length: int, key: Key) -> bool:
        """Nobody has it or promised it, and it can be kept: nobody shall wait for what cannot."""
        can_be_kept = length * self.memory.bytes_per_position <= self.prefixes.budget_bytes
        return can_be_kept and key not in self.prefixes and key not in self._promised

    def _keep_promises(self, row: Row) -> None:
        assert row.place is not None
        for length, key in [pair for pair in row.promises if pair[0] <= row.computed]:
            states = row.place.shelf.store.read(row.place.row, length)
            self.prefixes.put(key, Prefix(states, length))
            self._promised.pop(key, None)
            row.promises.remove((length, key))


def _useful(row: Row) -> list[tuple[int, Key]]:
    """Beginnings that may spare it work: one that reports on its text runs the text itself."""
    return [pair for pair in row.keys if pair[0] <= row.most_taken + 1] if row.is_reporting else row.keys


def _ends(placed: Sequence[Piece], order: Sequence[int]) -> Tensor:
    """Where each piece ends in a forward that runs them in that order."""
    ends = torch.empty(len(placed), dtype=torch.long)
    ends[torch.tensor(order)] = torch.tensor([placed[number].num_tokens for number in order]).cumsum(0) - 1
    return ends


def _stretch(row: Row, count: int) -> Stretch:
    prompt = row.request.prompt
    return Stretch(None if prompt is None else prompt.tensor, row.ids, row.computed, count)


def _piece(row: Row, count: int) -> Piece:
    assert row.place is not None
    return Piece(row.place.shelf.store, row.place.row, row.computed, count)
