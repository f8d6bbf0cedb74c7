"""The chunked loss and its gradient equal cross entropy over the full logits, whatever the size of a chunk."""

import pytest
import torch

from softprompt.loss import nll, weighted_nll

N, D, V = 23, 8, 31


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return hidden.requires_grad_(True), (lambda h: h @ head.T), ids, weights


def truth(hidden, head, ids, weights):
    logits = head(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(wide, ids, reduction="none")
    (gradient,) = torch.autograd.grad(3 * (losses * weights).sum(), hidden)
    return (losses * weights).sum().detach(), losses.detach(), gradient


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 23, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-14), (torch.bfloat16, 1e-2)]
)
def test_the_chunked_loss_and_gradient_equal_cross_entropy_on_full_logits(
    monkeypatch, rows_per_chunk, dtype, tolerance
):
    monkeypatch.setattr("softprompt.loss.chunked.CHUNK_BYTES", 4 * V * rows_per_chunk)
    hidden, head, ids, weights = inputs(dtype)
    total, losses = weighted_nll(head, hidden, ids, weights, V)
    (3 * total).backward()
    true_total, true_losses, true_gradient = truth(*inputs(dtype))
    torch.testing.assert_close(total.detach(), true_total, rtol=tolerance, atol=0)
    torch.testing.assert_close(losses, true_losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad, true_gradient, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(nll(head, hidden.detach(), ids, V), true_losses, rtol=tolerance, atol=tolerance)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert not losses.requires_grad


def test_only_one_chunk_of_logits_exists_at_a_time(monkeypatch):
    monkeypatch.setattr("softprompt.loss.chunked.CHUNK_BYTES", 4 * V * 5)
    hidden, head, ids, weights = inputs(torch.float32)
    rows_seen = []

    def watched(h):
        rows_seen.append(len(h))
        return head(h)

    weighted_nll(watched, hidden, ids, weights, V)
    assert rows_seen == [5, 5, 5, 5, 3]


def test_wrong_weights_of_targets_give_another_gradient_in_chunks():
    hidden, head, ids, weights = inputs(torch.float64)
    total, _ = weighted_nll(head, hidden, ids, weights.roll(1), V)
    (3 * total).backward()
    assert not torch.allclose(hidden.grad, truth(*inputs(torch.float64))[2], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunked_loss_of_no_targets_is_zero_and_so_is_its_gradient(dtype):
    hidden, head, ids, weights = inputs(dtype)
    total, losses = weighted_nll(head, hidden[:0], ids[:0], weights[:0], V)
    total.backward()
    assert (float(total.detach()), losses.shape) == (0.0, (0,))
    assert hidden.grad.count_nonzero() == 0
    assert nll(head, hidden[:0], ids[:0], V).shape == (0,)
