"""One optimiser step as bounded slices: micro-batches whose gradients add up to that of the whole step.

The loss of a step is the weighted sum of its targets' negative log-likelihoods, divided once by the sum of the weights
(their number, where all weigh 1). Rows name their prompt, so several prompts may train on one base at once; each is
divided by its own sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import weighted_nll
from softprompt.splice import Row, concatenate


def accumulate_gradient(
    base: Base, forward: Forward, prompts: Sequence[Tensor], rows: Sequence[Row], micro_batch_rows: int
) -> Iterator[float]:
    """Add a step's gradient to the prompts' `.grad`, one micro-batch at a time; yields each one's summed nats.

    Rows of like length go together, so that little of a micro-batch is padding.
    """
    row_weights = _row_weights(rows, len(prompts))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    for first in range(0, len(order), micro_batch_rows):
        chosen = order[first : first + micro_batch_rows]
        weights = torch.tensor([row_weights[index] for index in chosen], dtype=torch.float64)
        yield _micro_batch(base, forward, prompts, [rows[index] for index in chosen], weights)


def num_targets(row: Row) -> int:
    """Tokens of a row whose loss counts."""
    return sum(1 for weight in row.targets or () if weight)


def _row_weights(rows: Sequence[Row], num_prompts: int) -> list[float]:
    sums = [0.0] * num_prompts
    for row in rows:
        assert row.prompt is not None, "a training row names its prompt"
        sums[row.prompt] += sum(row.targets or ())
    return [1.0 / (sums[row.prompt] or 1.0) for row in rows if row.prompt is not None]


def _micro_batch(
    base: Base, forward: Forward, prompts: Sequence[Tensor], rows: Sequence[Row], row_weights_B: Tensor
) -> float:
    spliced = concatenate(base, rows, prompts, align="left")
    hidden_BSD = forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS)
    wanted = spliced.targets
    weights = row_weights_B.to(base.device)[wanted.rows] * wanted.weights
    weights = weights.to(torch.promote_types(base.dtype, torch.float32))
    total, nats = weighted_nll(
        forward.logits, hidden_BSD.flatten(0, 1)[wanted.slots], wanted.ids, weights, base.vocab_size
    )
    total.backward()
    return float(nats.double().sum())
