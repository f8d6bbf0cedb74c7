"""The loss among labels and its gradient equal cross entropy over the full logits with every other id ruled out."""

import pytest
import torch

from softprompt.families import Head
from softprompt.loss import weighted_label_nll

D, V = 6, 61
BRANCHES = [(3, 5), (3, 5, 60), (0, 7), (3, 60), (3, 5), (8, 9, 10, 11)]
OWN = [5, 60, 0, 3, 3, 10]
M = len(OWN)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def inputs(dtype, bias=False):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
    for tensor in linear.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(M, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
    return hidden, linear, torch.rand(M, generator=generator, dtype=torch.float64).to(dtype)


def truth(logits, hidden, weights):
    """Nats and gradient of three times their weighted sum, one branch after the other."""
    nats = torch.stack([
        torch.logsumexp(row[list(ids)], 0) - row[own] for row, ids, own in zip(logits, BRANCHES, OWN, strict=True)
    ])  # fmt: skip
    return nats.detach(), torch.autograd.grad(3 * (nats * weights).sum(), hidden)[0]


def assert_equal_to_truth(head, hidden, logits, weights, tolerance):
    total, nats = weighted_label_nll(head, hidden, OWN, BRANCHES, weights, V)
    (3 * total).backward()
    true_nats, true_gradient = truth(logits, hidden, weights)
    torch.testing.assert_close(nats, true_nats, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.detach(), (true_nats * weights).sum(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad, true_gradient, rtol=tolerance, atol=tolerance)
    assert not nats.requires_grad


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
@DTYPES
def test_the_loss_among_labels_equals_the_full_logits_of_the_head(dtype, bias, scale, cap):
    hidden, linear, weights = inputs(dtype, bias)
    logits = linear(hidden) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    assert_equal_to_truth(Head(linear, scale, cap), hidden, logits, weights, TOLERANCES[dtype])


class Doubled(torch.nn.Linear):
    """A head that is more than one plain matrix."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_a_head_that_cannot_be_cut_to_some_ids_runs_whole_in_chunks(monkeypatch, rows_per_chunk):
    monkeypatch.setattr("softprompt.loss.chunked.CHUNK_BYTES", 4 * V * rows_per_chunk)
    hidden, linear, weights = inputs(torch.float64)
    doubled = Doubled(D, V, bias=False, dtype=torch.float64).requires_grad_(False)
    doubled.load_state_dict(linear.state_dict())
    assert_equal_to_truth(Head(doubled), hidden, 2 * linear(hidden), weights, 1e-13)


def test_a_base_that_runs_whole_gives_its_logits_as_hidden_states():
    logits = torch.randn(M, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    weights = inputs(torch.float64)[2]
    assert_equal_to_truth(Head(None), logits, logits * 1.0, weights, 1e-13)


def test_bfloat16_states_have_their_logits_of_labels_in_float32():
    hidden, linear, weights = inputs(torch.bfloat16)
    total, nats = weighted_label_nll(Head(linear), hidden, OWN, BRANCHES, weights.float(), V)
    total.backward()
    wide = hidden.detach().float().requires_grad_(True)
    true_nats, true_gradient = truth(wide @ linear.weight.float().T, wide, weights.float() / 3)
    torch.testing.assert_close(nats, true_nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.float(), true_gradient, rtol=1e-2, atol=1e-2)


def test_other_labels_give_another_loss_and_gradient():
    hidden, linear, weights = inputs(torch.float64)
    total, nats = weighted_label_nll(Head(linear), hidden, OWN, [(*ids, 33) for ids in BRANCHES], weights, V)
    (3 * total).backward()
    true_nats, true_gradient = truth(linear(hidden), hidden, weights)
    assert not torch.allclose(nats, true_nats, rtol=1e-2)
    assert not torch.allclose(hidden.grad, true_gradient, rtol=1e-2)
