"""What a distribution says of one token, and of the likeliest. N tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.engine.choosing.peaks import best_first

Alternatives = tuple[tuple[int, float], ...]


def report(logits_NV: Tensor, ids: Sequence[int], counts: Sequence[int]) -> list[tuple[float, Alternatives]]:
    """Each id's nats under its row of raw logits, in float32, and (id, nats) of so many likeliest, best first."""
    log_probs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    chosen = torch.tensor(ids, device=logits_NV.device)
    values = log_probs_NV.gather(1, chosen[:, None])[:, 0].tolist()
    return list(zip(values, best_first(log_probs_NV, counts), strict=True))
