"""Which tokens a loss wants predicted, and which hidden states predict them.

N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.splice.rows import Row


@dataclass(frozen=True)
class Targets:
    """Where a loss is wanted, in row order. All [N], int64 but for the weights, on the base's device."""

    ids: Tensor  # the token to predict
    slots: Tensor  # index of the hidden state that predicts it, among those of one forward
    rows: Tensor  # its row
    columns: Tensor  # its index among the row's ids
    weights: Tensor  # of its loss, float64


def find_targets(rows: Sequence[Row], slot_of: Callable[[int, int], int], device: torch.device) -> Targets:
    """The targets of rows; `slot_of(row, column)` says which hidden state predicts a row's id."""
    wanted = [
        (row.ids[column], slot_of(index, column), index, column)
        for index, row in enumerate(rows)
        for column, weight in enumerate(row.targets or ())
        if weight
    ]
    weights = [float(weight) for row in rows for weight in row.targets or () if weight]
    ids, slots, owners, columns = torch.tensor(wanted, dtype=torch.long).view(-1, 4).t().to(device).unbind()
    return Targets(ids, slots, owners, columns, torch.tensor(weights, dtype=torch.float64, device=device))
