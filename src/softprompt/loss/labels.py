"""The loss among the labels of a set: where a row's label could become another, cross-entropy between the ids that
come next in one of them, and nothing elsewhere.

Summed over a label it is the negative log-likelihood of that label when nothing but the labels can be written, as in
guided decoding. The other ids of the vocabulary have no part in it, so the loss over the whole vocabulary is trained
beside it: greedy answers have to become the label and to end.

M branches, D hidden width, U ids that occur in any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.compute_share import yield_point
from softprompt.families import Head
from softprompt.loss.chunked import chunk_rows, with_gradient


def weighted_label_nll(
    head: Head,
    hidden_MD: Tensor,
    own_ids: Sequence[int],
    branches: Sequence[Sequence[int]],
    weights_M: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """The sum of weight times nats, with gradient, and each branch's own nats [M], without.

    `branches` are the ids of each, M of them, its own in `own_ids` among them; `hidden_MD` are the states that predict
    them. Softmax is float32 (float64 for a float64 base). `num_classes` is V; it bounds the logits at once of a head
    that cannot be cut to some ids.
    """
    known = sorted({token for ids in branches for token in ids})
    column = {token: number for number, token in enumerate(known)}
    is_out = torch.ones(len(branches), len(known), dtype=torch.bool)
    for number, ids in enumerate(branches):
        is_out[number, [column[token] for token in ids]] = False
    ids_U = torch.tensor(known, device=hidden_MD.device)
    own_M = torch.tensor([column[own] for own in own_ids], device=hidden_MD.device)
    is_out_MU = is_out.to(hidden_MD.device)

    def gradient(hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        parts = [tensor.split(chunk_rows(num_classes)) for tensor in (hidden, is_out_MU, own_M, weights)]
        found = [_chunk_gradient(head, ids_U, *chunk) for chunk in zip(*parts, strict=True)]
        return torch.cat([grad for grad, _ in found]), torch.cat([nats for _, nats in found])

    return with_gradient(gradient, hidden_MD, weights_M)


def _chunk_gradient(
    head: Head, ids_U: Tensor, hidden: Tensor, is_out: Tensor, own: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    yield_point()
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        logits = head.logits_of(leaf, ids_U).masked_fill(is_out, -torch.inf)
        nats = torch.nn.functional.cross_entropy(logits, own, reduction="none")
        (grad,) = torch.autograd.grad((nats * weights).sum(), leaf)
    return grad, nats.detach()
