"""The losses of tasks that read hidden states at columns: cloze, classify, tag, answer and embed.

B rows, N columns of all rows, D hidden width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.families.task_head import TaskHead
from softprompt.splice import Row
from softprompt.types import Example, InputForm

NO_LABEL = -100  # of a column that has none, as in transformers


@dataclass(frozen=True)
class Objective:
    """What rows of one form are trained for."""

    base: Base
    forward: Forward
    form: InputForm
    head: TaskHead | None  # None for cloze, which has the model's own, and embed

    @property
    def is_joint(self) -> bool:
        """Whether a row's loss depends on the other rows of its step (embed: they are its negatives)."""
        return self.form.task == "embed"

    def row_nats(
        self, states_ND: Tensor, owners_N: Tensor, rows: Sequence[Row], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of each row [B], differentiable, summed over what `num_targets` counts.

        `states_ND` are the states at the rows' columns, in row order, `owners_N` the number of each one's row,
        `weights` those of the head.
        """
        raise NotImplementedError

    def nats_of(
        self,
        own: Sequence[int],
        states_ND: Tensor,
        owners_N: Tensor,
        rows: Sequence[Row],
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss of some of the rows of a forward, those of the numbers in `own`; as `row_nats`."""
        number_of = torch.full((len(rows),), -1, device=owners_N.device)
        number_of[torch.tensor(own, device=owners_N.device)] = torch.arange(len(own), device=owners_N.device)
        is_own = number_of[owners_N] >= 0
        return self.row_nats(states_ND[is_own], number_of[owners_N[is_own]], [rows[number] for number in own], weights)


class ObjectiveWeights(NamedTuple):
    """An objective with the weights of its head, which are none where it has no head."""

    objective: Objective
    weights: Mapping[str, Tensor]


def num_labels(row: Row | Example) -> int:
    """What the loss of a row with columns is counted over: the words of a tagged text that have a tag, else one."""
    if len(row.columns) > 1 and len(row.labels) == len(row.columns):
        return sum(label != NO_LABEL for label in row.labels)
    return 1


def objective(base: Base, forward: Forward, form: InputForm) -> Objective | None:
    """The objective of the form's task; None for "generate", whose loss is on tokens."""
    if form.task == "generate":
        return None
    raise NotImplementedError
