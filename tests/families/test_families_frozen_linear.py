"""Products with frozen weights: another way to the same numbers, and nothing is left behind where it ends."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.slow_truth import relative_error
from support.tiny_bases import build_base
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from softprompt.families import FrozenLinearKernels, Head, frozen_linear
from softprompt.families.frozen_linear import active_kernels, can_prepack, float32_takes_onednn
from softprompt.families.patches import install_kernels
from softprompt.loss import weighted_nll

INPUTS, OUTPUTS = 48, 80
ROUNDING = 2**-7  # bfloat16's, twice over
needs_onednn = pytest.mark.skipif(not float32_takes_onednn(), reason="float32 products take torch's own way here")
needs_prepacking = pytest.mark.skipif(
    not can_prepack(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="this processor does not multiply bfloat16"
)
LAYERS = pytest.mark.parametrize("kind", ["linear", "linear_without_bias", "conv1d"])


def layer(kind, dtype=torch.float32):
    torch.manual_seed(0)
    made = Conv1D(OUTPUTS, INPUTS) if kind == "conv1d" else nn.Linear(INPUTS, OUTPUTS, bias=kind == "linear")
    if kind == "conv1d":
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    install_kernels(made)
    return made.to(dtype).requires_grad_(False)


def rows(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_ways(module, inputs):
    """Output, and the gradient by the inputs under a fixed pull."""
    leaf = inputs.detach().requires_grad_(True)
    out = module(leaf)
    out.backward(rows(*out.shape, dtype=out.dtype, seed=2))
    return out.detach(), leaf.grad


@pytest.fixture
def calls(monkeypatch):
    """The products of ours that have run; no weight is too small for them."""
    found, onednn = [], frozen_linear.onednn_linear
    monkeypatch.setattr(frozen_linear, "WORTH_ONEDNN", 0)

    def counted(*args):
        found.append(args)
        return onednn(*args)

    monkeypatch.setattr(frozen_linear, "onednn_linear", counted)
    return found


@needs_onednn
@pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (7, INPUTS), (1, 300, INPUTS), (2, 3, 5, INPUTS)])
@LAYERS
def test_float32_products_equal_those_of_torch_while_kernels_are_active_and_are_its_own_otherwise(kind, shape, calls):
    module, inputs = layer(kind), rows(*shape)
    truth = both_ways(module, inputs)
    with FrozenLinearKernels().active():
        found = both_ways(module, inputs)
    assert len(calls) == 2  # forward and backward
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-6
    again = both_ways(module, inputs)
    assert len(calls) == 2
    assert all(torch.equal(one, other) for one, other in zip(again, truth, strict=True))


@needs_onednn
@LAYERS
def test_products_of_rows_that_are_not_contiguous_are_the_same(kind, calls):
    module, inputs = layer(kind), rows(INPUTS, 9).t()
    assert not inputs.is_contiguous()
    truth = both_ways(module, inputs)
    with FrozenLinearKernels().active():
        found = both_ways(module, inputs)
        leaf = inputs.detach().requires_grad_(True)
        module(leaf).sum().backward()  # a gradient that repeats one number
    assert len(calls) == 4
    assert all(relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(found, truth, strict=True))
    plain = inputs.detach().requires_grad_(True)
    module(plain).sum().backward()
    assert relative_error(leaf.grad, plain.grad) < 1e-6


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("linear", "weight"),
        ("linear", "bias"),
        ("linear_without_bias", "weight"),
        ("conv1d", "weight"),
        ("conv1d", "bias"),
    ],
)
def test_a_layer_that_is_trained_uses_its_own_product(kind, what, calls):
    module = layer(kind)
    getattr(module, what).requires_grad_(True)
    with FrozenLinearKernels().active():
        module(rows(7, INPUTS)).sum().backward()
    assert getattr(module, what).grad is not None
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@LAYERS
def test_products_of_other_dtypes_keep_their_bits(kind, dtype, calls):
    module, inputs = layer(kind, dtype), rows(7, INPUTS, dtype=dtype)
    truth = both_ways(module, inputs)
    with FrozenLinearKernels().active():
        found = both_ways(module, inputs)
    assert not calls
    assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))


@LAYERS
def test_an_input_without_rows_gives_an_output_without_rows(kind, calls):
    with FrozenLinearKernels().active():
        assert layer(kind)(rows(0, INPUTS)).shape == (0, OUTPUTS)
    assert not calls


def test_a_layer_with_a_small_weight_uses_its_own_product(monkeypatch, calls):
    module, inputs = layer("linear"), rows(7, INPUTS)
    monkeypatch.setattr(frozen_linear, "WORTH_ONEDNN", INPUTS * OUTPUTS + 1)
    with FrozenLinearKernels().active():
        assert torch.equal(module(inputs), linear(inputs, module.weight, module.bias))
    assert not calls


@needs_onednn
def test_kernels_are_active_in_their_own_thread_only(calls):
    module, inputs = layer("linear"), rows(7, INPUTS)
    truth = module(inputs)
    with ThreadPoolExecutor(1) as threads, FrozenLinearKernels().active():
        assert threads.submit(active_kernels).result() is None
        torch.testing.assert_close(threads.submit(module, inputs).result(), truth)  # other threads, other sums
        assert not calls
        module(inputs)
    assert len(calls) == 1


def test_outer_kernels_are_active_again_after_inner_ones(calls):
    outer, inner, module, inputs = FrozenLinearKernels(), FrozenLinearKernels(), layer("linear"), rows(7, INPUTS)
    with outer.active():
        with inner.active():
            assert active_kernels() is inner
            module(inputs)
        assert active_kernels() is outer
        module(inputs)
    assert active_kernels() is None
    assert len(calls) == (2 if float32_takes_onednn() else 0)


def test_kernels_are_not_active_after_an_error(calls):
    module, inputs = layer("linear"), rows(7, INPUTS)
    with pytest.raises(RuntimeError), FrozenLinearKernels().active():
        module(rows(7, INPUTS + 1))
    calls.clear()
    assert active_kernels() is None
    module(inputs)
    assert not calls


def three_layers(dtype=torch.bfloat16):
    layers = nn.Sequential(layer("linear", dtype), nn.Tanh(), nn.Linear(OUTPUTS, INPUTS), layer("conv1d", dtype))
    install_kernels(layers)
    return layers.to(dtype).requires_grad_(False)


@needs_prepacking
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_prepacked_weights_give_the_products_of_plain_ones(num_rows, calls):
    layers, inputs, kernels = three_layers(), rows(1, num_rows, INPUTS, dtype=torch.bfloat16), FrozenLinearKernels()
    before, truth = copy.deepcopy(layers.state_dict()), both_ways(layers, inputs)
    kernels.prepack(layers, None)
    with kernels.active():
        found = both_ways(layers, inputs)
    assert len(calls) == 6
    assert all(weight.layout is torch._mkldnn for _, weight, _ in calls)
    assert all(relative_error(ours, theirs) < ROUNDING for ours, theirs in zip(found, truth, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    again = both_ways(layers, inputs)
    assert len(calls) == 6
    assert all(torch.equal(one, other) for one, other in zip(again, truth, strict=True))


@needs_prepacking
def test_a_layer_that_was_not_prepacked_uses_its_own_product(calls):
    kernels, other = FrozenLinearKernels(), layer("conv1d", torch.bfloat16)
    kernels.prepack(layer("linear", torch.bfloat16), None)
    with kernels.active():
        assert torch.equal(other(rows(7, INPUTS, dtype=torch.bfloat16)), other(rows(7, INPUTS, dtype=torch.bfloat16)))
    assert not calls


@needs_prepacking
@pytest.mark.parametrize("part", [lambda weight: weight[:10], lambda weight: weight.t()], ids=["slice", "transposed"])
def test_a_view_of_a_prepacked_weight_is_not_mistaken_for_the_weight(part):
    """It starts at the same address."""
    kernels, square = (
        FrozenLinearKernels(),
        nn.Linear(INPUTS, INPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False),
    )
    inputs, other = rows(7, INPUTS, dtype=torch.bfloat16), layer("linear_without_bias", torch.bfloat16)
    other.weight = nn.Parameter(part(square.weight), requires_grad=False)
    truth = other(inputs)
    kernels.prepack(square, None)
    with kernels.active():
        found = other(inputs)
    assert found.shape == truth.shape
    assert relative_error(found, truth) < ROUNDING


@needs_prepacking
def test_prepacking_copies_each_weight_twice_and_only_once():
    kernels, layers = FrozenLinearKernels(), three_layers()
    weights = [layers[index].weight for index in (0, 2, 3)]
    needed = kernels.bytes_to_prepack(layers, weights[0])
    assert needed == 2 * (weights[0].nbytes + sum(weight.nbytes for weight in weights))
    kernels.prepack(layers, weights[0])
    assert kernels.bytes_to_prepack(layers, weights[0]) == 0


@needs_prepacking
def test_a_subclass_of_a_linear_layer_is_not_prepacked():
    assert FrozenLinearKernels().bytes_to_prepack(FalconLinear(INPUTS, OUTPUTS, dtype=torch.bfloat16), None) == 0


@needs_prepacking
@pytest.mark.parametrize("num_targets", [0, 1, 23])
def test_a_prepacked_head_gives_the_same_loss_and_gradient(monkeypatch, num_targets, calls):
    monkeypatch.setattr(frozen_linear, "HEAD_BLOCK", 32)
    linear_head = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    kernels = FrozenLinearKernels()
    kernels.prepack(nn.Identity(), linear_head.weight)
    assert [len(block.weight) for block in kernels.row_blocks(linear_head.weight, 7)] == [32, 32, 16]
    ids = torch.arange(num_targets) * 3 % OUTPUTS
    leaf, plain = (rows(num_targets, INPUTS, dtype=torch.bfloat16).requires_grad_(True) for _ in range(2))
    total, nats = weighted_nll(Head(linear_head, kernels=kernels), leaf, ids, torch.ones(num_targets), OUTPUTS)
    total.backward()
    true_nats = cross_entropy(linear_head(plain).float(), ids, reduction="none")
    true_nats.sum().backward()
    torch.testing.assert_close(nats, true_nats.detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=0.03, atol=0.01)
    assert len(calls) == 6  # three blocks, forward and backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_weights_of_other_dtypes_are_not_prepacked(dtype):
    kernels, layers = FrozenLinearKernels(), three_layers(dtype)
    kernels.prepack(layers, layers[0].weight)
    assert kernels.bytes_to_prepack(layers, layers[0].weight) == 0
    assert [len(block.weight) for block in kernels.row_blocks(layers[0].weight, 32)] == [32, 32, 16]


GELUS = pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation, BloomGelu])


def gelus(kind, **where):
    """A module with our kernel, its own formula, and inputs on both sides."""
    installed, own = nn.Sequential(kind()), kind()
    install_kernels(installed)
    assert "forward" in vars(installed[0])
    return installed, own, torch.linspace(-9, 9, 4_001, **where)


@GELUS
def test_the_fused_gelu_equals_the_formula_written_out(kind):
    installed, own, inputs = gelus(kind)
    with FrozenLinearKernels().active():
        found = both_ways(installed, inputs)
    for ours, theirs in zip(found, both_ways(own, inputs.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@GELUS
def test_the_fused_gelu_rounds_bfloat16_once(kind):
    installed, own, inputs = gelus(kind, dtype=torch.bfloat16)
    truth = own(inputs.double())
    with FrozenLinearKernels().active():
        error = (installed(inputs).double() - truth).abs()
    assert (error <= truth.abs() * 2**-8 + 1e-6).all()


@GELUS
def test_a_gelu_without_active_kernels_or_in_float64_is_the_modules_own(kind):
    installed, own, inputs = gelus(kind)
    assert all(torch.equal(*pair) for pair in zip(both_ways(installed, inputs), both_ways(own, inputs), strict=True))
    wide = inputs.double()
    with FrozenLinearKernels().active():
        assert all(torch.equal(*pair) for pair in zip(both_ways(installed, wide), both_ways(own, wide), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_an_activation_that_is_no_written_out_gelu_is_not_patched(family):
    base = build_base(family, **({"activation_function": "relu"} if family == "gpt2" else {}))
    install_kernels(base.model)
    changed = {type(module) for module in base.model.modules() if "forward" in vars(module)}
    assert changed == ({nn.Linear, Conv1D} if family == "gpt2" else {nn.Linear, BloomGelu})
