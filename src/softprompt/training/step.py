"""One optimiser step as bounded slices: micro-batches whose gradients add up to that of the whole step.

The loss of a step is the weighted sum of its targets' negative log-likelihoods, divided once by the sum of the weights
(their number, where all weigh 1). Rows name their prompt, so several prompts may train on one base at once; each is
divided by its own sum. To that, rows whose loss is among the labels (`softprompt.loss.labels`) add the mean of it over
the rows.

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
from softprompt.loss import ObjectiveWeights, num_labels, weighted_label_nll, weighted_nll
from softprompt.splice import Prefix, Row, column_states, run_prompts, target_states
from softprompt.types import Branch


def accumulate_gradient(
    base: Base,
    forward: Forward,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    micro_batch_rows: int,
    checkpoint: bool = False,
    mine: Sequence[int] | None = None,
    least_batches: int = 0,
    heads: Sequence[ObjectiveWeights | None] = (),
) -> Iterator[Tensor]:
    """Add a step's gradient to the prompts' `.grad`, one micro-batch at a time; yields each one's nats by prompt [K].

    The nats are those of the targets, or, where a row's loss is among the labels, of its branches. The sums stay on the
    device, so that nothing waits for it.

    `heads` has for each prompt what its rows with columns are trained for, and the weights of its head, whose `.grad`
    is added to alike. Rows whose losses depend on each other are one micro-batch.

    Rows of like length go together, so that little of a padded micro-batch is padding. `checkpoint` keeps each layer's
    input only. `mine` are the rows that this process runs, where others run the rest: the loss of all is divided by the
    targets of all, so that the sum over the processes is the whole. `least_batches` is how many micro-batches to run at
    least, where the processes run in step: those that have no row left run one without targets, which adds zero.
    """
    weights = torch.tensor(_row_weights(rows, len(prompts)), dtype=torch.float64)  # [B, 2]
    order = sorted(range(len(rows)) if mine is None else mine, key=lambda index: rows[index].num_tokens)
    if any(head is not None and head.objective.is_joint for head in heads):
        micro_batch_rows = max(len(order), 1)
    batches = [order[first : first + micro_batch_rows] for first in range(0, len(order), micro_batch_rows)]
    num_idle = max(least_batches - len(batches), 0)
    has_targets = not all(row.columns for row in rows)  # states at columns are computed with the prompt beside them
    shared = has_targets and forward.can_share_prefix and len(batches) + num_idle > 1
    prefix = run_prompts(base, forward, prompts) if shared else None
    leaves = _leaves(prefix) if prefix is not None else None
    for chosen in batches:
        some = [rows[index] for index in chosen]
        yield _micro_batch(base, forward, prompts, some, weights[chosen], leaves, checkpoint, heads)
    for _ in range(num_idle):
        yield _micro_batch(base, forward, prompts, [_idle_row(rows)], weights[:1], leaves, checkpoint, heads)
    if prefix is not None and leaves is not None:
        _carry_on(prefix, leaves)
        yield torch.zeros(len(prompts), dtype=torch.float64, device=base.device)


def num_targets(row: Row) -> int:
    """What a row's loss is counted over: the tokens whose loss counts, or the one label."""
    if row.columns:
        return num_labels(row)
    if row.branches is not None:
        return 1
    return sum(1 for weight in row.targets or () if weight)


def _idle_row(rows: Sequence[Row]) -> Row:
    return replace(min(rows, key=lambda row: row.num_tokens), targets=None, branches=None, columns=())


def _row_weights(rows: Sequence[Row], num_prompts: int) -> list[tuple[float, float]]:
    """What each row's loss over the vocabulary is multiplied by, and its loss among the labels."""
    sums, counts = [0.0] * num_prompts, [0] * num_prompts
    for row in rows:
        assert row.prompt is not None, "a training row names its prompt"
        sums[row.prompt] += num_labels(row) if row.columns else sum(row.targets or ())
        counts[row.prompt] += 1
    return [
        (1.0 / (sums[row.prompt] or 1.0), 0.0 if row.branches is None else 1.0 / counts[row.prompt])
        for row in rows
        if row.prompt is not None
    ]


def _micro_batch(
    base: Base,
    forward: Forward,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    row_weights_B2: Tensor,
    prefix: Prefix | None,
    checkpoint: bool,
    heads: Sequence[ObjectiveWeights | None],
) -> Tensor:
    nats_K = torch.zeros(len(prompts), dtype=torch.float64, device=base.device)
    of_heads = [number for number, row in enumerate(rows) if row.columns]
    of_tokens = [number for number, row in enumerate(rows) if not row.columns]
    losses = []
    if of_tokens:
        some, weights_B2 = [rows[number] for number in of_tokens], row_weights_B2[of_tokens]
        losses.append(_token_loss(base, forward, prompts, some, weights_B2, prefix, checkpoint))
    if of_heads:
        some, weights_B = [rows[number] for number in of_heads], row_weights_B2[of_heads][:, 0]
        losses.append(_head_loss(base, forward, prompts, some, weights_B, checkpoint, heads))
    torch.stack([total for total, _, _ in losses]).sum().backward()
    for _, counted, owners in losses:
        nats_K.index_add_(0, owners, counted)
    return nats_K


def _head_loss(
    base: Base,
    forward: Forward,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    weights_B: Tensor,
    checkpoint: bool,
    heads: Sequence[ObjectiveWeights | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss of rows with columns, with gradient; the nats of each row, without, and their prompts."""
    states_ND, owners_N = column_states(base, forward, rows, prompts, checkpoint)
    nats, owners = [], []
    for index in sorted({row.prompt for row in rows if row.prompt is not None}):
        head = heads[index]
        assert head is not None, "rows with columns have an objective"
        own = [number for number, row in enumerate(rows) if row.prompt == index]
        nats.append(head.objective.nats_of(own, states_ND, owners_N, rows, head.weights))
        owners += own
    nats_B = torch.cat(nats)
    total = (nats_B * weights_B[owners].to(nats_B)).sum()
    of_prompts = torch.tensor([rows[number].prompt for number in owners], device=base.device)
    return total, nats_B.detach().double(), of_prompts


def _token_loss(
    base: Base,
    forward: Forward,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    row_weights_B2: Tensor,
    prefix: Prefix | None,
    checkpoint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss of rows with targets, with gradient; the nats of each target, without, and their prompts."""
    hidden_ND, wanted = target_states(base, forward, rows, prompts, prefix, checkpoint)
    over_all_B, among_labels_B = row_weights_B2.to(base.device).unbind(1)
    weights = (over_all_B[wanted.rows] * wanted.weights).to(torch.promote_types(base.dtype, torch.float32))
    total, nats = weighted_nll(forward.head, hidden_ND, wanted.ids, weights, base.vocab_size)
    counted, of_rows = nats.double().masked_fill(among_labels_B[wanted.rows] > 0, 0.0), wanted.rows
    found = list(_branches(rows))
    if found:
        among, label_nats, label_rows = _among_labels(base, forward, hidden_ND, rows, found, among_labels_B)
        total = total + among
        counted = torch.cat([counted, label_nats.double()])
        of_rows = torch.cat([of_rows, label_rows])
    owners = torch.tensor([row.prompt for row in rows], device=base.device)[of_rows]
    return total, counted, owners


def _among_labels(
    base: Base,
    forward: Forward,
    hidden_ND: Tensor,
    rows: Sequence[Row],
    found: Sequence[tuple[int, int, Branch]],
    weights_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The branches' loss times their rows' weights, with gradient; their nats [M], without, and their rows [M]."""
    targets, owners, _ = zip(*found, strict=True)
    own_ids = [rows[number].ids[branch.column] for _, number, branch in found]
    targets_M, rows_M = torch.tensor([targets, owners], device=base.device)
    weights = weights_B[rows_M].to(torch.promote_types(base.dtype, torch.float32))
    among = [branch.ids for _, _, branch in found]
    total, nats = weighted_label_nll(forward.head, hidden_ND[targets_M], own_ids, among, weights, base.vocab_size)
    return total, nats, rows_M


def _branches(rows: Sequence[Row]) -> Iterator[tuple[int, int, Branch]]:
    """Each branch, after its number among the rows' targets, which lie in row order, and the number of its row."""
    num_before = 0
    for number, row in enumerate(rows):
        columns = [column for column, weight in enumerate(row.targets or ()) if weight]
        target = {column: num_before + index for index, column in enumerate(columns)}
        yield from ((target[branch.column], number, branch) for branch in row.branches or ())
        num_before += len(columns)


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
