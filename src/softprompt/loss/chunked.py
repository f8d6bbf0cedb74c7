"""Summed negative log-likelihood over targets, in chunks, its gradient taken in the same pass.

Never more than one chunk of logits exists: [targets x vocabulary] of a batch would be gigabytes for a large
vocabulary. The head is frozen, so the only gradient is that of the hidden states. A head that is one plain matrix goes
block by block of its rows instead (`softprompt.loss.blocked`).

N targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from softprompt.compute_share import yield_point
from softprompt.families import Head
from softprompt.loss.blocked import blocked_nll

CHUNK_BYTES = 64 * 2**20  # of float32 logits

AnyHead = Head | Callable[[Tensor], Tensor]


def weighted_nll(
    head: AnyHead, hidden_ND: Tensor, target_ids_N: Tensor, weights_N: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The sum of weight times negative log-likelihood, with gradient, and each target's own nats [N], without.

    Log-softmax is float32 (float64 for a float64 base). `num_classes` is V; it sets the size of a chunk.
    """
    return with_gradient(
        lambda hidden, weights: _gradient(head, hidden, target_ids_N, weights, num_classes), hidden_ND, weights_N
    )


Gradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of hidden states [N, D] and weights [N]


def with_gradient(gradient: Gradient, hidden_ND: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of nats, with gradient, and the nats [N], without.

    `gradient` gives the gradient [N, D] of that sum and the nats, both at once.
    """
    total, nll = _WeightedNll.apply(hidden_ND, weights_N, gradient)  # type: ignore[no-untyped-call]
    return total, nll


def nll(head: AnyHead, hidden_ND: Tensor, target_ids_N: Tensor, num_classes: int) -> Tensor:
    """Each target's negative log-likelihood in nats [N], without gradient."""
    with torch.no_grad():
        if _is_one_matrix(head):
            return blocked_nll(head, hidden_ND, target_ids_N, None)[0]
        return torch.cat([_logits_nll(head(h), ids) for h, ids in _chunks(hidden_ND, target_ids_N, num_classes)])


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, gradient: Gradient
    ) -> tuple[Tensor, Tensor]:  # Any: autograd's context
        grad, nll_N = gradient(hidden, weights)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), None, None


def _is_one_matrix(head: AnyHead) -> TypeGuard[Head]:
    return isinstance(head, Head) and head.weight is not None


def _gradient(head: AnyHead, hidden: Tensor, ids: Tensor, weights: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Gradient [N, D] of the weighted sum, and nats [N]."""
    if _is_one_matrix(head):
        nats, grad = blocked_nll(head, hidden, ids, weights)
        assert grad is not None
        return grad, nats
    parts = [
        _chunk_gradient(head, h, chunk_ids, w)
        for (h, chunk_ids), w in zip(_chunks(hidden, ids, num_classes), _split(weights, num_classes), strict=True)
    ]
    return torch.cat([grad for grad, _ in parts]), torch.cat([losses for _, losses in parts])


def _chunk_gradient(head: AnyHead, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    yield_point()
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        losses = _logits_nll(head(leaf), ids)
        (grad,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return grad, losses.detach()


def _logits_nll(logits: Tensor, ids: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, ids, reduction="none")


def chunk_rows(num_classes: int) -> int:
    """Targets of one chunk of logits."""
    return max(1, CHUNK_BYTES // (4 * num_classes))


def _split(tensor: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = tensor.split(chunk_rows(num_classes))  # an empty tensor is one empty chunk
    return chunks


def _chunks(hidden: Tensor, ids: Tensor, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(_split(hidden, num_classes), _split(ids, num_classes), strict=True))
