"""The processes that train one run together. The loop is handed them; how they start and talk is not its business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

ItemT = TypeVar("ItemT")


class Ranks(Protocol):
    """One process among `count` that hold the same prompts and share out a step's rows."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; the same bits everywhere. Every rank must call it."""


class Alone:
    """The only process."""

    rank = 0
    count = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """There is nothing to add."""


def share(items: Sequence[ItemT], sizes: Sequence[int], ranks: Ranks) -> list[ItemT]:
    """This rank's items, in order: dealt out from the largest down, there and back, so that all get about as much."""
    if ranks.count == 1:
        return list(items)
    largest_first = sorted(range(len(items)), key=lambda index: (-sizes[index], index))
    mine = [index for place, index in enumerate(largest_first) if _dealt_to(place, ranks.count) == ranks.rank]
    return [items[index] for index in sorted(mine)]


def _dealt_to(place: int, count: int) -> int:
    turn, position = divmod(place, count)
    return position if turn % 2 == 0 else count - 1 - position
