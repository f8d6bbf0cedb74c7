"""The concatenated layout: [soft prompt, BOS, text] per row, positions from the prompt's start, pads on one side.

Pads are zero vectors, masked by length and never by id, so a pad token is not needed and may equal EOS.

Both alignments are exact for every tested family. A loss uses left-aligned rows: causal attention does not see pads
behind a row, so nothing is masked, and every slot has itself to attend to (a masked pad has nothing, which is NaN where
a float64 base attends in float32). In right-aligned rows the last slot has the last hidden state of every row.

B rows, S slots, H embedding width, P prompt length (ragged), T text length (ragged), N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.splice.embed import Row, Targets, embed_with_prompt, find_targets

Alignment = Literal["right", "left"]


@dataclass(frozen=True)
class Concatenated:
    """One batch of embeddings, ready for a forward."""

    embeds_BSH: Tensor
    mask_BS: Tensor  # 0 at pads in front, which a row must not see; 1 elsewhere
    positions_BS: Tensor  # counted from the first virtual token; 0 at pads
    lengths: tuple[int, ...]  # P + T of each row
    text_slots: tuple[int, ...]  # flat, row * S + slot, of each row's first id
    targets: Targets


def concatenate(base: Base, rows: Sequence[Row], prompts: Sequence[Tensor], align: Alignment = "left") -> Concatenated:
    """Splice rows with their prompts [P, H]; gradients flow into the prompts, and into nothing else."""
    pieces = [(None if row.prompt is None else prompts[row.prompt], row.ids) for row in rows]
    lengths = [len(ids) + (0 if prompt is None else prompt.shape[0]) for prompt, ids in pieces]
    embeds = embed_with_prompt(base, pieces).split(lengths)
    num_slots = max(lengths)
    first_slots = [num_slots - length if align == "right" else 0 for length in lengths]
    text_slots = [  # flat: row * S + slot
        number * num_slots + first + length - len(row.ids)
        for number, (row, first, length) in enumerate(zip(rows, first_slots, lengths, strict=True))
    ]
    mask, positions = _mask_and_positions(lengths, first_slots, num_slots)
    return Concatenated(
        embeds_BSH=torch.stack([_pad(own, first, num_slots) for own, first in zip(embeds, first_slots, strict=True)]),
        mask_BS=mask.to(base.device),
        positions_BS=positions.to(base.device),
        lengths=tuple(lengths),
        text_slots=tuple(text_slots),
        targets=find_targets(rows, text_slots, [slot - 1 for slot in text_slots], base.device),
    )


def _pad(own: Tensor, first_slot: int, num_slots: int) -> Tensor:
    behind = num_slots - first_slot - own.shape[0]
    return torch.nn.functional.pad(own, (0, 0, first_slot, behind))


def _mask_and_positions(lengths: list[int], first_slots: list[int], num_slots: int) -> tuple[Tensor, Tensor]:
    slots = torch.arange(num_slots).expand(len(lengths), num_slots)
    positions = slots - torch.tensor(first_slots)[:, None]
    is_in_front = positions < 0
    is_behind = positions >= torch.tensor(lengths)[:, None]
    return (~is_in_front).long(), positions.masked_fill(is_in_front | is_behind, 0)
