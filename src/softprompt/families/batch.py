"""What the attention of a forward needs to know about its tokens: the attention metadata of a packed or a cached batch.

A `PackedBatch` is for training: the tokens of many rows in one sequence, each row attending to its soft prompt and to
itself. Nothing is padded, and a soft prompt stands once, however many rows share it. A `CachedBatch` is for generation:
new tokens of many rows, whose earlier keys and values lie in `KVBuffer`s. A `CrossBatch` is a cached batch whose keys
and values are those of encoders' states.

A batch reaches the attention modules as an argument of the forward: as its attention mask (`BatchMask`), as
transformers' BlockMask does for FlexAttention, or as its cache (`BatchCache`). An attention that does not know them
gets NaN or an error, never a wrong answer.

S tokens of a forward, E prefix tokens from an earlier pass, h heads, d width of a head, M keys; a padded group has
G rows of n queries each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from softprompt.families.kv_buffer import KeysValues, KVBuffer

Carrier = Literal["mask", "cache"]  # the argument of the forward that brings a batch to the attention
Made = TypeVar("Made")
_MOST_NATIVE = 2**11  # queries times keys of a chunk that the native attention computes faster
_MOST_WASTE = 2  # queries with pads, as a multiple of those without, in a padded group


@dataclass(frozen=True)
class Scoring:
    """What a family computes between the products of queries and keys, and the softmax."""

    scale: float
    window: int | None = None  # a token sees this many tokens, itself included
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    position_bias: Tensor | None = None  # [h, M] float32: added to the scores by the key's position (ALiBi)
    relative_bias: Tensor | None = None  # [h, 2M - 1]: the same by key's position - query's + M - 1 (T5)
    upcast: bool = False  # 16-bit queries and keys are multiplied in float32


@dataclass(frozen=True)
class Segment:
    """A run of tokens that see each other, causally or all of them, behind their prefix."""

    first: int  # among the packed tokens
    length: int
    prefix: tuple[int, int] | None = None  # (first, length) among the keys: prefix tokens first, then the packed ones


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One packed sequence: its segments, and keys and values that come from an earlier pass or go to a later one."""

    segments: tuple[Segment, ...]
    prefixes: dict[nn.Module, KeysValues] | None = None  # by attention module: keys and values of E tokens
    kept: dict[nn.Module, KeysValues] | None = None  # filled with this pass's own keys and values
    checkpoint: bool = False  # activation checkpointing: keep each layer's input, rerun the layer in the backward pass
    is_causal: bool = True  # False: every token of a segment sees all of it (an encoder)
    is_cross: bool = False  # every token of a segment sees all of its prefix, and nothing else: other tokens' keys
    made: dict[Any, Any] = field(default_factory=dict)  # by `once`

    @property
    def max_keys(self) -> int:
        """Most keys that any token sees."""
        return max(segment.length + (segment.prefix or (0, 0))[1] for segment in self.segments)


Indices = slice | Tensor  # a slice where they are consecutive, which copies nothing


@dataclass(frozen=True)
class QueryChunk:
    """Consecutive tokens of one row in this forward."""

    buffer: KVBuffer
    row: int
    first_position: int
    num_tokens: int
    is_cross: bool = False  # all of them see the positions up to the first one

    def position(self, index: int) -> int:
        """The last position that a token sees, by its index among these."""
        return self.first_position if self.is_cross else self.first_position + index


@dataclass(frozen=True, eq=False)
class PaddedGroup:
    """Chunks of one buffer that are computed at once, padded to n queries. Pads repeat a real token."""

    rows: Indices  # of the buffer
    shape: tuple[int, int]  # G, n
    queries: Indices  # [G * n] tokens of the forward
    positions_Gn: Tensor
    tokens: Indices  # the real ones, in the forward
    picks: Indices  # the same among the group's G * n


@dataclass(frozen=True, eq=False)
class PaddedTokens:
    """Tokens of one buffer whose attention is matrix products, in padded groups."""

    tokens: Indices  # of the forward
    rows: Tensor  # of the buffer, by token
    positions: Tensor
    groups: tuple[PaddedGroup, ...]


@dataclass(frozen=True, eq=False)
class NativeTokens:
    """Tokens of one buffer whose attention reads more than it computes, one by one in C; int64 on the CPU."""

    tokens: Tensor
    rows: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class BufferBatch:
    """The tokens of a forward that belong to one buffer."""

    buffer: KVBuffer
    padded: PaddedTokens | None
    native: NativeTokens | None


@dataclass(frozen=True, eq=False)
class CachedBatch:
    """All tokens of one forward over cached keys and values."""

    parts: tuple[BufferBatch, ...]
    made: dict[Any, Any] = field(default_factory=dict)  # by `once`

    @property
    def max_keys(self) -> int:
        """At least the most keys that any token sees."""
        return max(part.buffer.capacity for part in self.parts)

    @cached_property
    def is_one_group(self) -> bool:
        """Whether one padded group is the whole forward, token by token."""
        if any(part.native is not None for part in self.parts):
            return False
        groups = [group for part in self.parts if part.padded is not None for group in part.padded.groups]
        return len(groups) == 1 and isinstance(groups[0].queries, slice) and isinstance(groups[0].picks, slice)


@dataclass(frozen=True, eq=False)
class CrossBatch:
    """All tokens of one forward over keys and values of encoders' states, some of which come with this forward."""

    queries: CachedBatch
    written: tuple[QueryChunk, ...]  # of the states that come, in their order

    @property
    def max_keys(self) -> int:
        """At least the most keys that any token sees."""
        return self.queries.max_keys

    @property
    def made(self) -> dict[Any, Any]:
        return self.queries.made


AttentionBatch = PackedBatch | CachedBatch | CrossBatch


def once(batch: AttentionBatch, key: Any, make: Callable[[], Made]) -> Made:
    """A value that every layer of a forward shares, made by the first one."""
    if key not in batch.made:
        batch.made[key] = make()
    found: Made = batch.made[key]
    return found


class BatchMask(torch.Tensor):
    """A [1, 1, 1, 1] attention mask of NaN that carries a batch; transformers passes 4-D masks on as they are."""

    batch: AttentionBatch

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    @staticmethod
    def of(batch: AttentionBatch, like: Tensor) -> BatchMask:
        mask = torch.Tensor._make_subclass(BatchMask, like.new_full((1, 1, 1, 1), float("nan")))
        assert isinstance(mask, BatchMask)
        mask.batch = batch
        return mask


class BatchCache(DynamicCache):
    """An empty cache that carries a batch to the attention modules; nothing is stored in it."""

    def __init__(self, batch: AttentionBatch) -> None:
        super().__init__()
        self.batch = batch

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """A module that fills it does not know our batches, and would give wrong answers."""
        raise NotImplementedError("this attention does not know packed rows")

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """One key, none before it: the model's own causal mask, which nothing reads, stays small."""
        return 1, 0


def batch_order(chunks: Sequence[QueryChunk]) -> list[int]:
    """The order of chunks that makes their tokens consecutive in a forward: by buffer, single tokens first."""
    return sorted(range(len(chunks)), key=lambda number: _order(chunks[number]))


def cached_batch(chunks: Sequence[QueryChunk], device: torch.device, has_native: bool = False) -> CachedBatch:
    """The chunks of a forward, in the order of its tokens. A row may come once.

    `has_native`: `softprompt.families.cached_attention` attends to single tokens and small chunks in C.
    """
    firsts = accumulate((chunk.num_tokens for chunk in chunks), initial=0)
    placed = sorted(zip(chunks, firsts, strict=False), key=lambda pair: _order(pair[0]))
    parts = [_part(list(own), device, has_native) for _, own in groupby(placed, key=lambda pair: id(pair[0].buffer))]
    return CachedBatch(tuple(parts))


PlacedChunk = tuple[QueryChunk, int]  # with its first token in the forward


def _order(chunk: QueryChunk) -> tuple[int, int, int, int]:
    return chunk.buffer.capacity, id(chunk.buffer), chunk.num_tokens, chunk.row


def _part(placed: list[PlacedChunk], device: torch.device, has_native: bool) -> BufferBatch:
    native = [pair for pair in placed if has_native and _is_small(pair[0])]
    padded = [pair for pair in placed if not has_native or not _is_small(pair[0])]
    return BufferBatch(
        buffer=placed[0][0].buffer,
        padded=_padded(padded, device) if padded else None,
        native=NativeTokens(*(_index(numbers, device) for numbers in _by_token(native))) if native else None,
    )


def _is_small(chunk: QueryChunk) -> bool:
    num_keys = chunk.first_position + chunk.num_tokens
    return chunk.num_tokens == 1 or chunk.num_tokens * num_keys <= _MOST_NATIVE


def _padded(placed: list[PlacedChunk], device: torch.device) -> PaddedTokens:
    single = [pair for pair in placed if pair[0].num_tokens == 1]
    groups = [_single_token_group(single, device)] if single else []
    groups += [_group(batch, device) for batch in _by_length([pair for pair in placed if pair[0].num_tokens > 1])]
    tokens, rows, positions = _by_token(placed)
    return PaddedTokens(_indices(tokens, device), _index(rows, device), _index(positions, device), tuple(groups))


def _by_token(placed: list[PlacedChunk]) -> tuple[list[int], list[int], list[int]]:
    """For each token its number in the forward, its row in the buffer and its position in the row."""
    each = [(chunk, first, i) for chunk, first in placed for i in range(chunk.num_tokens)]
    tokens = [first + i for _, first, i in each]
    return tokens, [chunk.row for chunk, _, _ in each], [chunk.position(i) for chunk, _, i in each]


def _single_token_group(placed: list[PlacedChunk], device: torch.device) -> PaddedGroup:
    """One new token of each row. All rows up to the last one in use are read in place; rows without a query get a
    dummy one, and its result is dropped."""
    num_rows = max(chunk.row for chunk, _ in placed) + 1
    queries, positions = [placed[0][1]] * num_rows, [0] * num_rows
    for chunk, first in placed:
        queries[chunk.row], positions[chunk.row] = first, chunk.first_position
    return PaddedGroup(
        rows=slice(0, num_rows),
        shape=(num_rows, 1),
        queries=_indices(queries, device),
        positions_Gn=_index(positions, device)[:, None],
        tokens=_indices([first for _, first in placed], device),
        picks=_indices([chunk.row for chunk, _ in placed], device),
    )


def _by_length(placed: list[PlacedChunk]) -> list[list[PlacedChunk]]:
    """Chunks of similar length together, as long as few queries are pads; they come sorted."""
    batches: list[list[PlacedChunk]] = []
    for pair in placed:
        batch = batches[-1] if batches else []
        real = sum(chunk.num_tokens for chunk, _ in batch) + pair[0].num_tokens
        if batch and (len(batch) + 1) * pair[0].num_tokens <= _MOST_WASTE * real:
            batch.append(pair)
        else:
            batches.append([pair])
    return batches


def _group(placed: list[PlacedChunk], device: torch.device) -> PaddedGroup:
    num_queries = max(chunk.num_tokens for chunk, _ in placed)
    own = [[min(i, chunk.num_tokens - 1) for i in range(num_queries)] for chunk, _ in placed]
    real = [(number, i) for number, (chunk, _) in enumerate(placed) for i in range(chunk.num_tokens)]
    positions = [[chunk.position(i) for i in steps] for (chunk, _), steps in zip(placed, own, strict=True)]
    return PaddedGroup(
        rows=_indices([chunk.row for chunk, _ in placed], device),
        shape=(len(placed), num_queries),
        queries=_indices([first + i for (_, first), steps in zip(placed, own, strict=True) for i in steps], device),
        positions_Gn=torch.tensor(positions, device=device),
        tokens=_indices([placed[number][1] + i for number, i in real], device),
        picks=_indices([number * num_queries + i for number, i in real], device),
    )


def _indices(numbers: list[int], device: torch.device) -> Indices:
    first = numbers[0]
    is_range = numbers == list(range(first, first + len(numbers)))
    return slice(first, first + len(numbers)) if is_range else _index(numbers, device)


def _index(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)
