"""Stretches of rows: any positions of [soft prompt, BOS, text, answer], for a forward over what is held of the rest.

Positions count from the first virtual token, as in every layout. The float32 prompt is cast to the base's dtype here.

S tokens of a forward, H embedding width, P prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base import Base


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive positions of one row."""

    prompt: Tensor | None  # the whole soft prompt [P, H]
    ids: Sequence[int]  # of the whole row: text and answer
    first: int
    length: int

    @property
    def virtual(self) -> slice:
        """Which vectors of the soft prompt it covers."""
        num_virtual = 0 if self.prompt is None else self.prompt.shape[0]
        return slice(min(self.first, num_virtual), min(self.first + self.length, num_virtual))

    @property
    def own_ids(self) -> Sequence[int]:
        """The token ids that it covers."""
        num_virtual = 0 if self.prompt is None else self.prompt.shape[0]
        return self.ids[max(self.first - num_virtual, 0) : max(self.first + self.length - num_virtual, 0)]


def embed_spans(base: Base, stretches: Sequence[TokenSpan]) -> tuple[Tensor, Tensor]:
    """Embeddings [S, H] and positions [S] of the stretches, one behind the other."""
    text = base.token_inputs(torch.tensor([i for stretch in stretches for i in stretch.own_ids], dtype=torch.long))
    positions = [i for stretch in stretches for i in range(stretch.first, stretch.first + stretch.length)]
    embeds = text if len(text) == len(positions) else _with_prompts(base, stretches, text)
    return embeds, torch.tensor(positions, device=base.device)


def _with_prompts(base: Base, stretches: Sequence[TokenSpan], texts: Tensor) -> Tensor:
    parts = []
    for stretch, text in zip(stretches, texts.split([len(one.own_ids) for one in stretches]), strict=True):
        if stretch.prompt is not None:
            parts.append(base.virtual_inputs(stretch.prompt[stretch.virtual]))
        parts.append(text)
    return torch.cat(parts)
