"""The attention of the rows that a forward brings: packed for training, held in memory for generation."""

from __future__ import annotations

from torch import Tensor, nn

from softprompt.families.attention import attend_packed
from softprompt.families.held import CachedBatch
from softprompt.families.held_attention import attend_held
from softprompt.families.packed import CarriedRows, PackedBatch
from softprompt.families.scores import Scores


def attend(rows: CarriedRows, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Attention output [S, h, d] of queries [h, S, d], keys and values [k, S, d]."""
    if isinstance(rows, CachedBatch):
        return attend_held(rows, module, query, key, value, scores)
    assert isinstance(rows, PackedBatch), type(rows)
    return attend_packed(rows, module, query, key, value, scores)
