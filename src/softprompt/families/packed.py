"""Packed rows: the tokens of many rows in one sequence, each row attending to its soft prompt and to itself.

Nothing is padded, and a soft prompt stands once, however many rows share it: its keys and values are those of every
row. Who sees whom travels as the attention mask of the forward, as an argument: `PackedMask` is to packed rows what
transformers' BlockMask is to FlexAttention. An attention that does not know it meets NaN, never a wrong answer.

S packed tokens, E prefix tokens from an earlier pass, h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

Carrier = Literal["mask", "cache"]  # the argument of the forward that brings the rows to the attention
Made = TypeVar("Made")
KeysValues = tuple[Tensor, Tensor]  # each [h, tokens, d]


class CarriedRows(Protocol):
    """What the attention of a family asks of the rows that a forward brings it: packed ones, or held ones."""

    @property
    def checkpoint(self) -> bool:
        """Keep each layer's input only, and run the layer again in the backward pass."""
        ...

    @property
    def longest(self) -> int:
        """At least the most keys that any token sees."""
        ...

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """Something that every layer shares."""
        ...


@dataclass(frozen=True)
class Segment:
    """A run of tokens that see each other causally, behind their prefix."""

    first: int  # among the packed tokens
    length: int
    prefix: tuple[int, int] | None = None  # (first, length) among the keys: prefix tokens first, then the packed ones


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One packed sequence: its segments, and what a pass takes from an earlier one or keeps for a later one."""

    segments: tuple[Segment, ...]
    prefixes: dict[nn.Module, KeysValues] | None = None  # by attention module: keys and values of E tokens
    kept: dict[nn.Module, KeysValues] | None = None  # filled with this pass's own keys and values
    checkpoint: bool = False  # keep each layer's input only, and run the layer again in the backward pass
    made: dict[Any, Any] = field(default_factory=dict)  # what every layer shares: groups, masks, position biases

    @property
    def longest(self) -> int:
        """Most keys that any token sees."""
        return max(segment.length + self.prefix_length(segment) for segment in self.segments)

    def prefix_length(self, segment: Segment) -> int:
        return segment.prefix[1] if segment.prefix is not None else 0

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """Something that every layer shares."""
        if key not in self.made:
            self.made[key] = make()
        found: Made = self.made[key]
        return found


class PackedMask(torch.Tensor):
    """A [1, 1, 1, 1] attention mask of NaN that carries rows; transformers passes 4-D masks on as they are."""

    rows: CarriedRows

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    @staticmethod
    def of(rows: CarriedRows, like: Tensor) -> PackedMask:
        mask = torch.Tensor._make_subclass(PackedMask, like.new_full((1, 1, 1, 1), float("nan")))
        assert isinstance(mask, PackedMask)
        mask.rows = rows
        return mask
