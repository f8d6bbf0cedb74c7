"""The concatenated layout: [soft prompt, BOS, text] per row, positions from the prompt's start, pads on one side.

This is the one place where prompts meet token embeddings, masks, positions and targets. Pads are zero vectors, masked
by length and never by id, so a pad token is not needed and may equal EOS. The float32 prompt is cast to the base's
dtype here and nowhere else.

Both alignments are exact for every tested family. A loss takes left-aligned rows: pads behind a row are out of its
causal sight, so nothing is masked, and every slot has itself to attend to (a masked pad has nothing, which is NaN where
a float64 base attends in float32). Generation takes right-aligned ones: the last hidden state of every row lies in
the last slot.

B rows, S slots, H embedding width, P prompt length (ragged), T text length (ragged), N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.splice.rows import Row
from softprompt.splice.targets import Targets, find_targets

Alignment = Literal["right", "left"]


@dataclass(frozen=True)
class Concatenated:
    """One batch of embeddings, ready for a forward."""

    embeds_BSH: Tensor
    mask_BS: Tensor  # 0 at pads in front, which a row must not see; 1 elsewhere
    positions_BS: Tensor  # counted from the first virtual token; 0 at pads
    lengths_B: Tensor  # P + T of each row
    targets: Targets


def concatenate(base: Base, rows: Sequence[Row], prompts: Sequence[Tensor], align: Alignment = "left") -> Concatenated:
    """Splice rows with their prompts [P, H]; gradients flow into the prompts, and into nothing else."""
    pieces = [_row_embeds(base, row, prompts) for row in rows]
    lengths = [piece.shape[0] for piece in pieces]
    num_slots = max(lengths)
    first_slots = [num_slots - length if align == "right" else 0 for length in lengths]
    mask, positions = _mask_and_positions(lengths, first_slots, num_slots)
    return Concatenated(
        embeds_BSH=torch.stack(
            [_pad(piece, first, num_slots) for piece, first in zip(pieces, first_slots, strict=True)]
        ),
        mask_BS=mask.to(base.device),
        positions_BS=positions.to(base.device),
        lengths_B=torch.tensor(lengths, device=base.device),
        targets=_targets(rows, lengths, first_slots, num_slots, base.device),
    )


def _row_embeds(base: Base, row: Row, prompts: Sequence[Tensor]) -> Tensor:
    text = base.token_inputs(torch.tensor(list(row.ids), dtype=torch.long))
    if row.prompt is None:
        return text
    return torch.cat([base.virtual_inputs(prompts[row.prompt]), text])


def _pad(piece: Tensor, first_slot: int, num_slots: int) -> Tensor:
    behind = num_slots - first_slot - piece.shape[0]
    return torch.nn.functional.pad(piece, (0, 0, first_slot, behind))


def _mask_and_positions(lengths: list[int], first_slots: list[int], num_slots: int) -> tuple[Tensor, Tensor]:
    slots = torch.arange(num_slots).expand(len(lengths), num_slots)
    positions = slots - torch.tensor(first_slots)[:, None]
    is_in_front = positions < 0
    is_behind = positions >= torch.tensor(lengths)[:, None]
    return (~is_in_front).long(), positions.masked_fill(is_in_front | is_behind, 0)


def _targets(
    rows: Sequence[Row], lengths: list[int], first_slots: list[int], num_slots: int, device: torch.device
) -> Targets:
    """Slots are flat: row * S + slot."""

    def slot_of(index: int, column: int) -> int:
        text_start = index * num_slots + first_slots[index] + lengths[index] - len(rows[index].ids)
        return text_start + column - 1

    return find_targets(rows, slot_of, device)
