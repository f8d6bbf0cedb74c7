"""The packed layout: the tokens of all rows in one sequence, each row behind its soft prompt, which stands once.

Nothing is padded. The prompts lie in front of the rows in the same sequence, or were run in an earlier pass (`Prefix`)
whose keys and values the rows attend to. Positions restart at every row, behind its own prompt. A hidden state depends
on its own row and prompt alone; that is tested against the concatenated layout, with a neighbour's tokens changed as
the control.

S packed tokens, E tokens of all prompts, H embedding width, D hidden width, K prompts, P prompt length (ragged).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from softprompt.base import Base
from softprompt.families import KeysValues, PackedBatch, Segment
from softprompt.splice.rows import Row
from softprompt.splice.targets import Targets, find_targets

Range = tuple[int, int]  # first, length


@dataclass(frozen=True)
class Prefix:
    """What rows need of the soft prompts that were run before them."""

    ranges: tuple[Range, ...]  # of each prompt among the E tokens
    states: dict[nn.Module, KeysValues]  # by attention module: [h, E, d] each
    last_hidden_KD: Tensor  # at each prompt's last vector, which predicts a row's first token


@dataclass(frozen=True)
class Packed:
    """One packed sequence, ready for a forward. Target slots count the prefix's K last hidden states first."""

    embeds_SH: Tensor
    positions_S: Tensor
    rows: PackedBatch
    targets: Targets


def pack(
    base: Base, rows: Sequence[Row], prompts: Sequence[Tensor], prefix: Prefix | None = None, checkpoint: bool = False
) -> Packed:
    """Splice rows with their prompts [P, H], or behind a prefix of them; gradients flow into either."""
    lengths = [prompt.shape[0] for prompt in prompts]
    ranges = prefix.ranges if prefix is not None else _ranges(lengths, 0)
    in_front = [] if prefix is not None else [Segment(first, length) for first, length in ranges]
    own = _ranges([len(row.ids) for row in rows], sum(segment.length for segment in in_front))
    behind = [
        Segment(first, length, ranges[row.prompt] if row.prompt is not None else None)
        for (first, length), row in zip(own, rows, strict=True)
    ]
    segments = tuple(segment for segment in (*in_front, *behind) if segment.length)
    text = base.token_inputs(torch.tensor([i for row in rows for i in row.ids], dtype=torch.long))
    return Packed(
        embeds_SH=torch.cat([*map(base.virtual_inputs, prompts), text]) if prefix is None else text,
        positions_S=_positions(segments, base.device),
        rows=PackedBatch(segments, prefixes=prefix.states if prefix is not None else None, checkpoint=checkpoint),
        targets=_targets(base, rows, own, ranges, len(ranges) if prefix is not None else 0),
    )


def pack_prompts(base: Base, prompts: Sequence[Tensor]) -> tuple[Packed, tuple[Range, ...]]:
    """The prompts alone, in a sequence that keeps their keys and values; and where each lies."""
    ranges = _ranges([prompt.shape[0] for prompt in prompts], 0)
    segments = tuple(Segment(first, length) for first, length in ranges)
    packed = Packed(
        embeds_SH=torch.cat([base.virtual_inputs(prompt) for prompt in prompts]),
        positions_S=_positions(segments, base.device),
        rows=PackedBatch(segments, kept={}),
        targets=find_targets((), lambda row, column: 0, base.device),
    )
    return packed, ranges


def _targets(
    base: Base, rows: Sequence[Row], own: Sequence[Range], ranges: Sequence[Range], num_before: int
) -> Targets:
    def slot_of(index: int, column: int) -> int:
        if column:
            return num_before + own[index][0] + column - 1
        prompt = rows[index].prompt
        assert prompt is not None
        return prompt if num_before else sum(ranges[prompt]) - 1

    return find_targets(rows, slot_of, base.device)


def _ranges(lengths: Sequence[int], first: int) -> tuple[Range, ...]:
    ends = accumulate(lengths, initial=first)
    return tuple(zip(ends, lengths, strict=False))


def _positions(segments: Sequence[Segment], device: torch.device) -> Tensor:
    before = [segment.prefix[1] if segment.prefix is not None else 0 for segment in segments]
    parts = [torch.arange(start, start + s.length) for start, s in zip(before, segments, strict=True)]
    return torch.cat([torch.arange(0), *parts]).to(device)
