"""The same layout one token further: what a forward over a filled cache is given for the next token of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.splice.concatenate import Concatenated


def append(base: Base, spliced: Concatenated, next_ids_B: Tensor) -> Concatenated:
    """Right-aligned rows grown by one token each; only the new slot's embeddings [B, 1, H] and positions [B, 1]."""
    targets = spliced.targets
    return Concatenated(
        embeds_BSH=base.embed(next_ids_B[:, None]),
        mask_BS=torch.cat([spliced.mask_BS, spliced.mask_BS.new_ones(len(next_ids_B), 1)], dim=1),
        positions_BS=spliced.lengths_B[:, None],
        lengths_B=spliced.lengths_B + 1,
        targets=targets,
    )


def keep(spliced: Concatenated, rows: Tensor) -> Concatenated:
    """The batch without its finished rows; `rows` are the indices that stay."""
    return Concatenated(
        embeds_BSH=spliced.embeds_BSH[rows],
        mask_BS=spliced.mask_BS[rows],
        positions_BS=spliced.positions_BS[rows],
        lengths_B=spliced.lengths_B[rows],
        targets=spliced.targets,
    )
