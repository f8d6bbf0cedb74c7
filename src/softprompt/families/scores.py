"""How a family scores a query against a key.

h query heads, M keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What stands between the products of queries and keys, and the softmax."""

    scale: float
    window: int | None = None  # a token sees this many tokens, itself included
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    position_bias: Tensor | None = None  # [h, M] float32: added to the scores by the key's position (ALiBi)
    upcast: bool = False  # 16-bit queries and keys are multiplied in float32
