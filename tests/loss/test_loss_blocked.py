"""The blocked loss and its gradient equal cross entropy over the full logits, whatever the size of a block."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.families import Head, PackedWeight
from softprompt.loss import blocked, nll, weighted_nll

N, D, V = 23, 4, 61
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def cut(monkeypatch, block_size, most_targets=N):
    monkeypatch.setattr(blocked, "SMALLEST_BLOCK", block_size)
    monkeypatch.setattr(blocked, "BLOCK_NUMBERS", {"cpu": 1})
    monkeypatch.setattr(blocked, "MOST_TARGETS", most_targets)


def inputs(dtype, size=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    linear = torch.nn.Linear(D, V, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(size * torch.randn(V, D, generator=generator, dtype=torch.float64))
    ids = torch.randint(0, V, (N,), generator=generator)
    ids[:4] = torch.tensor([0, V - 1, 4, 5])  # the ends of the vocabulary and of a block
    weights = torch.rand(N, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return hidden.requires_grad_(True), linear, ids, weights


def truth(hidden, linear, ids, weights, scale=1.0, cap=None):
    """Nats and gradient by torch's own cross entropy."""
    logits = linear(hidden) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = torch.nn.functional.cross_entropy(wide, ids, reduction="none")
    (gradient,) = torch.autograd.grad(3 * (nats * weights).sum(), hidden)
    return nats.detach(), gradient


def assert_close(found, true, tolerance):
    torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance * float(true.abs().max()))


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize(("block_size", "most_targets"), [(1, N), (5, 10), (20, 1), (V, N), (1_000, 1_000)])
@DTYPES
def test_the_blocked_loss_and_gradient_equal_cross_entropy_on_full_logits(
    monkeypatch, dtype, block_size, most_targets, scale, cap
):
    cut(monkeypatch, block_size, most_targets)
    hidden, linear, ids, weights = inputs(dtype)
    head, tolerance = Head(linear, scale, cap), TOLERANCES[dtype]
    total, nats = weighted_nll(head, hidden, ids, weights, V)
    (3 * total).backward()
    true_nats, true_gradient = truth(*inputs(dtype), scale, cap)
    assert_close(total.detach(), (true_nats * weights).sum(), tolerance)
    assert_close(nats, true_nats, tolerance)
    assert_close(hidden.grad, true_gradient, tolerance)
    assert torch.equal(nll(head, hidden.detach(), ids, V), nats)
    assert nats.dtype == torch.promote_types(dtype, torch.float32)
    assert not nats.requires_grad
    assert linear.weight.grad is None


@pytest.mark.parametrize("cap", [None, 5.0])
@DTYPES
def test_peaked_distributions_stay_finite_and_exact(monkeypatch, dtype, cap):
    """Logits of tens of thousands, either sign, with the largest in the first, a middle or the last block."""
    cut(monkeypatch, 5)
    hidden, linear, ids, weights = inputs(dtype, size=5_000.0)
    assert float(linear(hidden).detach().abs().max()) > 1e4
    total, nats = weighted_nll(Head(linear, cap=cap), hidden, ids, weights, V)
    (3 * total).backward()
    true_nats, true_gradient = truth(*inputs(dtype, size=5_000.0), cap=cap)
    assert nats.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert_close(nats, true_nats, TOLERANCES[dtype])
    assert_close(hidden.grad, true_gradient, TOLERANCES[dtype])


def test_wrong_weights_of_targets_give_another_gradient(monkeypatch):
    cut(monkeypatch, 5)
    hidden, linear, ids, weights = inputs(torch.float64)
    total, _ = weighted_nll(Head(linear), hidden, ids, weights.roll(1), V)
    (3 * total).backward()
    assert not torch.allclose(hidden.grad, truth(*inputs(torch.float64))[1], rtol=1e-2)


@DTYPES
def test_a_blocked_loss_of_no_targets_is_zero_and_so_is_its_gradient(dtype):
    hidden, linear, ids, weights = inputs(dtype)
    total, nats = weighted_nll(Head(linear), hidden[:0], ids[:0], weights[:0], V)
    total.backward()
    assert (float(total.detach()), nats.shape) == (0.0, (0,))
    assert hidden.grad.count_nonzero() == 0
    assert nll(Head(linear), hidden[:0], ids[:0], V).shape == (0,)


class LargestTensor(TorchDispatchMode):
    """The most numbers of any tensor that an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_only_one_block_of_logits_exists_at_a_time(monkeypatch):
    cut(monkeypatch, 5)
    times, shapes, earlier = PackedWeight.times, [], []

    def watched(matrix, rows, bias=None):
        assert all(logits() is None for logits in earlier)
        found = times(matrix, rows, bias)
        shapes.append(tuple(found.shape))
        earlier.append(weakref.ref(found))
        return found

    monkeypatch.setattr(PackedWeight, "times", watched)
    hidden, linear, ids, weights = inputs(torch.float32)
    with LargestTensor() as largest:
        weighted_nll(Head(linear), hidden, ids, weights, V)
    assert shapes == [(N, 5)] * 12 + [(N, 1)]
    assert largest.numbers == linear.weight.numel() < N * V


def test_the_size_of_a_block_fits_the_cache_within_limits():
    sizes = [blocked.block_size(torch.empty(num_targets, D)) for num_targets in (0, 1, 300, 1_000, 4_096)]
    assert sizes == [8_192, 8_192, 5_000, 1_500, 512]


def test_a_head_with_a_bias_is_computed_in_chunks_of_targets(monkeypatch):
    monkeypatch.setattr(PackedWeight, "times", None)
    hidden, _, ids, weights = inputs(torch.float64)
    linear = torch.nn.Linear(D, V, dtype=torch.float64).requires_grad_(False)
    total, nats = weighted_nll(Head(linear), hidden, ids, weights, V)
    (3 * total).backward()
    true_nats, true_gradient = truth(hidden, linear, ids, weights)
    assert_close(nats, true_nats, 1e-13)
    assert_close(hidden.grad, true_gradient, 1e-13)
