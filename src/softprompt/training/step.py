"""One optimiser step as bounded slices: micro-batches whose gradients add up to that of the whole step.

The loss of a step is the weighted sum of its targets' negative log-likelihoods, divided once by the sum of the weights
(their number, where all weigh 1). Rows name their prompt, so several prompts may train on one base at once; each is
divided by its own sum.

The prompts run through the base once per step, however many micro-batches there are: the micro-batches give the
gradient by the prompts' keys and values, and one backward pass of the prompts alone carries their sum on. By the chain
rule that is the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import weighted_nll
from softprompt.splice import Prefix, Row, run_prompts, target_states


def accumulate_gradient(
    base: Base,
    forward: Forward,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    micro_batch_rows: int,
    checkpoint: bool = False,
    mine: Sequence[int] | None = None,
    least_batches: int = 0,
) -> Iterator[Tensor]:
    """Add a step's gradient to the prompts' `.grad`, one micro-batch at a time; yields each one's nats by prompt [K].

    The sums stay on the device, so that nothing waits for it.

    Rows of like length go together, so that little of a padded micro-batch is padding. `checkpoint` keeps each layer's
    input only. `mine` are the rows that this process runs, where others run the rest: the loss of all is divided by the
    targets of all, so that the sum over the processes is the whole. `least_batches` is how many micro-batches to run at
    least, where the processes run in step: those that have no row left run one without targets, which adds zero.
    """
    weights = torch.tensor(_row_weights(rows, len(prompts)), dtype=torch.float64)
    order = sorted(range(len(rows)) if mine is None else mine, key=lambda index: len(rows[index].ids))
    batches = [order[first : first + micro_batch_rows] for first in range(0, len(order), micro_batch_rows)]
    num_idle = max(least_batches - len(batches), 0)
    shared = forward.can_share_prefix and len(batches) + num_idle > 1
    prefix = run_prompts(base, forward, prompts) if shared else None
    leaves = _leaves(prefix) if prefix is not None else None
    for chosen in batches:
        some = [rows[index] for index in chosen]
        yield _micro_batch(base, forward, prompts, some, weights[chosen], leaves, checkpoint)
    for _ in range(num_idle):
        yield _micro_batch(base, forward, prompts, [_idle_row(rows)], weights[:1], leaves, checkpoint)
    if prefix is not None and leaves is not None:
        _carry_on(prefix, leaves)
        yield torch.zeros(len(prompts), dtype=torch.float64, device=base.device)


def num_targets(row: Row) -> int:
    """Tokens of a row whose loss counts."""
    return sum(1 for weight in row.targets or () if weight)


def _idle_row(rows: Sequence[Row]) -> Row:
    return replace(min(rows, key=lambda row: len(row.ids)), targets=None)


def _row_weights(rows: Sequence[Row], num_prompts: int) -> list[float]:
    sums = [0.0] * num_prompts
    for row in rows:
        assert row.prompt is not None, "a training row names its prompt"
        sums[row.prompt] += sum(row.targets or ())
    return [1.0 / (sums[row.prompt] or 1.0) for row in rows if row.prompt is not None]


def _micro_batch(
    base: Base,
    forward: Forward,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    row_weights_B: Tensor,
    prefix: Prefix | None,
    checkpoint: bool,
) -> Tensor:
    hidden_ND, wanted = target_states(base, forward, rows, prompts, prefix, checkpoint)
    weights = row_weights_B.to(base.device)[wanted.rows] * wanted.weights
    weights = weights.to(torch.promote_types(base.dtype, torch.float32))
    total, nats = weighted_nll(forward.head, hidden_ND, wanted.ids, weights, base.vocab_size)
    total.backward()
    owners = torch.tensor([row.prompt for row in rows], device=base.device)[wanted.rows]
    return torch.zeros(len(prompts), dtype=torch.float64, device=base.device).index_add(0, owners, nats.double())


def _leaves(prefix: Prefix) -> Prefix:
    """The prefix as the start of a graph: gradients end in it."""
    states = {module: (_leaf(key), _leaf(value)) for module, (key, value) in prefix.states.items()}
    return replace(prefix, states=states, last_hidden_KD=_leaf(prefix.last_hidden_KD))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(True)


def _carry_on(prefix: Prefix, leaves: Prefix) -> None:
    """Carry the gradients that the micro-batches left in the leaves on into the prompts."""
    pairs = [*zip(_tensors(prefix), _tensors(leaves), strict=True)]
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    if reached:
        torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])


def _tensors(prefix: Prefix) -> list[Tensor]:
    return [*(tensor for pair in prefix.states.values() for tensor in pair), prefix.last_hidden_KD]
