"""Which rows make up which step: a pure function of integers. It knows no tokens, tensors or ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence


def plan_epoch(
    lengths: Sequence[int],  # tokens of each row
    *,
    batch_rows: int,
    batch_tokens: int | None = None,  # tokens per batch at most, pads not counted; takes the place of batch_rows
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Batches of row positions: a permutation by seed and epoch, cut by rows or by tokens. Every row exactly once.

    A row longer than `batch_tokens` is a batch of its own.
    """
    order = list(range(len(lengths)))
    # Seeded by text, which `random` hashes the same on every machine, so that (0, 1) and (1, 0) differ.
    random.Random(f"epoch:{seed}:{epoch}").shuffle(order)
    if batch_tokens is None:
        return [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    return _cut_by_tokens(order, lengths, batch_tokens)


def _cut_by_tokens(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for position in order:
        if not batches or lengths[position] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(position)
        room -= lengths[position]
    return batches
