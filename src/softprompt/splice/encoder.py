"""Rows of an encoder: [CLS], soft prompt, text, [SEP] with the prompt behind [CLS] (the default), or in front of it.

Every token sees every other one of its row, the virtual ones too, so what a soft prompt computes depends on the text
and cannot be shared between rows. Positions count from the first token, virtual ones included.

N columns, D hidden width, P prompt length, H embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.splice.embed import Row


def encoded_columns(
    base: Base, forward: Forward, rows: Sequence[Row], prompts: Sequence[Tensor], checkpoint: bool = False
) -> tuple[Tensor, Tensor]:
    """The hidden states [N, D] at the rows' columns, in row order, and the number of each one's row [N].

    A column is an index among the row's ids; -1 is the first virtual token. Gradients flow into the prompts.
    """
    raise NotImplementedError
