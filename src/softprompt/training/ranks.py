"""The processes that train one run together. The loop is handed them; how they start and talk is not its business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

ItemT = TypeVar("ItemT")


class Ranks(Protocol):
    """One process among `count` that hold the same prompts and share out a step's rows."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def num_on_this_machine(self) -> int:
        """How many of them share this machine's memory."""

    @property
    def in_step(self) -> bool:
        """Whether each rank holds but a part of the base: then all must run as many forwards, at the same time."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; the same bits everywhere. Every rank must call it."""


class Alone:
    """The only process."""

    rank = 0
    count = 1
    num_on_this_machine = 1
    in_step = False

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """There is nothing to add."""


def share(items: Sequence[ItemT], sizes: Sequence[int], ranks: Ranks) -> list[ItemT]:
    """This rank's items, in order: dealt out from the largest down, there and back, so that all get about as much."""
    if ranks.count == 1:
        return list(items)
    largest_first = sorted(range(len(items)), key=lambda index: (-sizes[index], index))
    mine = [index for place, index in enumerate(largest_first) if _dealt_to(place, ranks.count) == ranks.rank]
    return [items[index] for index in sorted(mine)]


def most_shared(num_items: int, ranks: Ranks) -> int:
    """How many items the rank with the most of them gets."""
    return -(-num_items // ranks.count)


def least(value: int, ranks: Ranks) -> int:
    """The least of all ranks' values. Every rank must call it."""
    values = torch.zeros(ranks.count, dtype=torch.float64)
    values[ranks.rank] = value
    ranks.sum([values])
    return int(values.min())


def _dealt_to(place: int, count: int) -> int:
    turn, position = divmod(place, count)
    return position if turn % 2 == 0 else count - 1 - position
