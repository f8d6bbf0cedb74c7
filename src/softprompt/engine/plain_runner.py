"""One row at a time through transformers' own forward and cache, on concatenated embeddings: slow, and right for every
base. For a base that the fast way does not fit, and for a row so long that its positions depend on its company. A base
without a cache that holds runs the whole row for every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.engine.rows import Ran, Row
from softprompt.families import Forward
from softprompt.splice import Stretch, splice_stretches


class PlainRunner:
    """The slow way: a `Runner` in which each row has a cache of its own, and all the memory it may come to need.

    `bytes_per_row`: of the states that a row has however short it is.
    """

    def __init__(
        self, base: Base, forward: Forward, budget_bytes: int, bytes_per_position: int, bytes_per_row: int = 0
    ) -> None:
        self.base = base
        self.forward = forward
        self.budget_bytes = budget_bytes
        self.bytes_per_position = bytes_per_position
        self.bytes_per_row = bytes_per_row
        self.num_bytes = 0
        is_fixed = forward.alone_beyond is None  # else a whole text's positions are not those of its parts
        self.reads_in_pieces = is_fixed and forward.reads_in_pieces

    def can_ever_hold(self, length: int) -> bool:
        return self._bytes(length) <= self.budget_bytes

    def is_worth_waiting(self, row: Row) -> bool:
        return False

    def start(self, row: Row) -> bool:
        needed = self._bytes(row.longest)
        if self.num_bytes + needed > self.budget_bytes:
            return False
        self.num_bytes += needed
        row.cache = self.forward.new_cache()
        return True

    def make_room(self, row: Row) -> bool:
        return True

    def stop(self, row: Row) -> None:
        self.num_bytes -= self._bytes(row.longest)
        row.cache, row.computed = None, 0

    def run(self, pieces: Sequence[tuple[Row, int]]) -> Ran:
        last: list[Tensor] = []
        telling: list[tuple[Row, Tensor]] = []
        for row, count in pieces:
            which = row.telling(count) if row.is_reporting else None
            hidden = self._run_one(row, count)
            last.append(hidden[-1])
            if which is not None:
                telling.append((row, hidden[which]))
        return Ran(torch.stack(last), telling)

    def _run_one(self, row: Row, count: int) -> Tensor:
        """Hidden states [count, D]."""
        prompt = row.request.prompt
        first = row.computed if row.cache is not None else 0
        row.computed += count
        stretch = Stretch(None if prompt is None else prompt.tensor, row.ids, first, row.computed - first)
        embeds_SH, positions_S = splice_stretches(self.base, [stretch])
        mask = torch.ones(1, row.computed, dtype=torch.long, device=embeds_SH.device)
        return self.forward.hidden_states(embeds_SH[None], mask, positions_S[None], row.cache)[0, -count:]

    def _bytes(self, length: int) -> int:
        return self.bytes_per_row + length * self.bytes_per_position
