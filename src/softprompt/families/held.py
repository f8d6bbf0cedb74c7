"""Rows whose keys and values stay in memory from one forward to the next: what a generation step brings.

A `KVBuffer` holds rows of one capacity, each position in its own slot, so that a step reads whole tensors and copies
nothing. The tokens of one forward may be one new token of each of many rows, and pieces of texts that are read in.

R rows of a store, C its capacity in positions, k key heads, d width of a head; S tokens of a forward, G rows of a group
with n queries each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from softprompt.families.packed import KeysValues

Made = TypeVar("Made")
_MOST_LIGHT = 2**11  # queries times keys of a piece whose attention is little work
_MOST_WASTE = 2  # queries with pads, as a multiple of those without, in a group of pieces


class KVBuffer:
    """Keys and values [R, k, C, d] of each attention module; a module's are made when it first writes."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.tensors: dict[nn.Module, KeysValues] = {}

    def of(self, module: nn.Module, key: Tensor, value: Tensor) -> KeysValues:
        """The module's keys and values; `key` and `value` [tokens, k, d] show their shape."""
        found = self.tensors.get(module)
        if found is None:
            found = self.tensors[module] = (self._empty(key), self._empty(value))
        return found

    def like(self, num_rows: int, capacity: int) -> KVBuffer:
        """An empty one of other sizes for the same modules, its memory taken."""
        made = KVBuffer(num_rows, capacity)
        for module, (keys, values) in self.tensors.items():
            made.of(module, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        return made

    def resize(self, num_rows: int) -> None:
        """More or fewer rows; the first ones keep what they hold. Where memory ends half-way, as many rows as before
        may be used."""
        kept = self.num_rows = min(num_rows, self.num_rows)
        for module, pair in self.tensors.items():
            keys, values = (part.new_zeros(num_rows, *part.shape[1:]) for part in pair)
            keys[:kept], values[:kept] = pair[0][:kept], pair[1][:kept]
            self.tensors[module] = (keys, values)
        self.num_rows = num_rows

    def read(self, row: int, length: int) -> dict[nn.Module, KeysValues]:
        """A copy of a row's first positions, [k, length, d] of each module."""
        return {
            module: (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for module, (keys, values) in self.tensors.items()
        }

    def write(self, row: int, states: dict[nn.Module, KeysValues], length: int) -> None:
        """Put the first `length` positions of what `read` gave into a row."""
        for module, (key, value) in states.items():
            keys, values = self.of(module, key.transpose(0, 1), value.transpose(0, 1))
            keys[row, :, :length] = key[:, :length]
            values[row, :, :length] = value[:, :length]

    def copy_row(self, source: int, target: KVBuffer, row: int, length: int) -> None:
        """The first `length` positions of a row into a row of this or of another store."""
        target.write(
            row, {m: (k[source, :, :length], v[source, :, :length]) for m, (k, v) in self.tensors.items()}, length
        )

    def num_bytes(self) -> int:
        """Of all rows."""
        return sum(part.nbytes for pair in self.tensors.values() for part in pair)

    def clear(self, row: int) -> None:
        """Zeros: slots that a row does not see weigh 0, and 0 times what an overflow left there is NaN."""
        for pair in self.tensors.values():
            for part in pair:
                part[row].zero_()

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_rows, like.shape[1], self.capacity, like.shape[2])


@dataclass(frozen=True)
class QueryChunk:
    """Consecutive tokens of one row in this forward."""

    store: KVBuffer
    row: int
    first_position: int
    num_tokens: int


Some = slice | Tensor  # a slice where they lie side by side, which copies nothing


@dataclass(frozen=True, eq=False)
class Group:
    """Pieces of one store that are worked on at once, padded to n queries. Pads repeat a real token."""

    rows: Some  # of the store
    shape: tuple[int, int]  # G, n
    queries: Some  # [G * n] tokens of the forward
    positions_Gn: Tensor
    tokens: Some  # the real ones, in the forward
    picks: Some  # the same among the group's G * n


@dataclass(frozen=True, eq=False)
class PaddedTokens:
    """Tokens of one store whose attention is matrix products, in groups of like pieces."""

    tokens: Some  # of the forward
    rows: Tensor  # of the store, by token
    positions: Tensor
    groups: tuple[Group, ...]


@dataclass(frozen=True, eq=False)
class NativeTokens:
    """Tokens of one store whose attention reads more than it computes, each by itself; int64 on the CPU."""

    tokens: Tensor
    rows: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """What a forward does in one store."""

    store: KVBuffer
    heavy: PaddedTokens | None
    light: NativeTokens | None


@dataclass(frozen=True, eq=False)
class CachedBatch:
    """All of one forward; as an argument of it, it reaches every attention module."""

    parts: tuple[Part, ...]
    checkpoint: bool = False
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max(part.store.capacity for part in self.parts)

    @cached_property
    def is_one_group(self) -> bool:
        """Whether one group is the whole forward, token by token."""
        if any(part.light is not None for part in self.parts):
            return False
        groups = [group for part in self.parts if part.heavy is not None for group in part.heavy.groups]
        return len(groups) == 1 and isinstance(groups[0].queries, slice) and isinstance(groups[0].picks, slice)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """Something that every layer shares."""
        if key not in self.made:
            self.made[key] = make()
        found: Made = self.made[key]
        return found


def batch_order(pieces: Sequence[QueryChunk]) -> list[int]:
    """The order of pieces in a forward that lets their tokens lie side by side: by store, single tokens first."""
    return sorted(range(len(pieces)), key=lambda number: _place(pieces[number]))


def cached_batch(pieces: Sequence[QueryChunk], device: torch.device, has_native: bool = False) -> CachedBatch:
    """The pieces of a forward, in the order of its tokens. A row may come once.

    `has_native`: tokens whose attention is little work are told apart (`families.native`).
    """
    firsts = accumulate((piece.num_tokens for piece in pieces), initial=0)
    placed = sorted(zip(pieces, firsts, strict=False), key=lambda pair: _place(pair[0]))
    parts = [_part(list(own), device, has_native) for _, own in groupby(placed, key=lambda pair: id(pair[0].store))]
    return CachedBatch(tuple(parts))


Placed = tuple[QueryChunk, int]  # with its first token in the forward


def _place(piece: QueryChunk) -> tuple[int, int, int, int]:
    return piece.store.capacity, id(piece.store), piece.num_tokens, piece.row


def _part(placed: list[Placed], device: torch.device, has_native: bool) -> Part:
    light = [pair for pair in placed if has_native and _is_light(pair[0])]
    heavy = [pair for pair in placed if not has_native or not _is_light(pair[0])]
    return Part(
        store=placed[0][0].store,
        heavy=_heavy(heavy, device) if heavy else None,
        light=NativeTokens(*(_index(part, device) for part in _lists(light))) if light else None,
    )


def _is_light(piece: QueryChunk) -> bool:
    return piece.num_tokens == 1 or piece.num_tokens * (piece.first_position + piece.num_tokens) <= _MOST_LIGHT


def _heavy(placed: list[Placed], device: torch.device) -> PaddedTokens:
    single = [pair for pair in placed if pair[0].num_tokens == 1]
    groups = [_single_group(single, device)] if single else []
    groups += [_group(batch, device) for batch in _batches([pair for pair in placed if pair[0].num_tokens > 1])]
    tokens, rows, positions = _lists(placed)
    return PaddedTokens(_some(tokens, device), _index(rows, device), _index(positions, device), tuple(groups))


def _lists(placed: list[Placed]) -> tuple[list[int], list[int], list[int]]:
    """Of each token: its number in the forward, its row in the store, its position in the row."""
    each = [(piece, first, i) for piece, first in placed for i in range(piece.num_tokens)]
    tokens = [first + i for _, first, i in each]
    return tokens, [piece.row for piece, _, _ in each], [piece.first_position + i for piece, _, i in each]


def _single_group(placed: list[Placed], device: torch.device) -> Group:
    """One new token of each row. The rows up to the last in use are read where they lie, whoever else is among them:
    a row without a query gets the first piece's, and nobody reads its answer."""
    num_rows = max(piece.row for piece, _ in placed) + 1
    queries, positions = [placed[0][1]] * num_rows, [0] * num_rows
    for piece, first in placed:
        queries[piece.row], positions[piece.row] = first, piece.first_position
    return Group(
        rows=slice(0, num_rows),
        shape=(num_rows, 1),
        queries=_some(queries, device),
        positions_Gn=_index(positions, device)[:, None],
        tokens=_some([first for _, first in placed], device),
        picks=_some([piece.row for piece, _ in placed], device),
    )


def _batches(placed: list[Placed]) -> list[list[Placed]]:
    """Neighbours by length together, as long as little is pads; they come sorted."""
    batches: list[list[Placed]] = []
    for pair in placed:
        batch = batches[-1] if batches else []
        real = sum(piece.num_tokens for piece, _ in batch) + pair[0].num_tokens
        if batch and (len(batch) + 1) * pair[0].num_tokens <= _MOST_WASTE * real:
            batch.append(pair)
        else:
            batches.append([pair])
    return batches


def _group(placed: list[Placed], device: torch.device) -> Group:
    num_queries = max(piece.num_tokens for piece, _ in placed)
    own = [[min(i, piece.num_tokens - 1) for i in range(num_queries)] for piece, _ in placed]
    real = [(number, i) for number, (piece, _) in enumerate(placed) for i in range(piece.num_tokens)]
    positions = [[piece.first_position + i for i in steps] for (piece, _), steps in zip(placed, own, strict=True)]
    return Group(
        rows=_some([piece.row for piece, _ in placed], device),
        shape=(len(placed), num_queries),
        queries=_some([first + i for (_, first), steps in zip(placed, own, strict=True) for i in steps], device),
        positions_Gn=torch.tensor(positions, device=device),
        tokens=_some([placed[number][1] + i for number, i in real], device),
        picks=_some([number * num_queries + i for number, i in real], device),
    )


def _some(numbers: list[int], device: torch.device) -> Some:
    first = numbers[0]
    is_range = numbers == list(range(first, first + len(numbers)))
    return slice(first, first + len(numbers)) if is_range else _index(numbers, device)


def _index(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)
