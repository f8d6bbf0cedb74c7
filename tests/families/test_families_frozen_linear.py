"""Products with frozen weights: another way to the same numbers, and nothing is left behind where it ends."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

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

from softprompt.families import FrozenLinearKernels, Head, PackedWeight, frozen_linear
from softprompt.families.frozen_linear import (
    HEAD_BLOCK,
    MAX_NATIVE_ROWS,
    MEASURED_ROWS,
    WAYS,
    active_kernels,
    can_prepack,
    can_prepack_float32,
    float32_takes_onednn,
    product_name,
)
from softprompt.families.patches import install_kernels
from softprompt.loss import weighted_nll

INPUTS, OUTPUTS = 48, 80
ROUNDING = 2**-7  # bfloat16's, twice over
needs_onednn = pytest.mark.skipif(not float32_takes_onednn(), reason="float32 products take torch's own way here")
needs_prepacking = pytest.mark.skipif(
    not can_prepack(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="this processor does not multiply bfloat16"
)
needs_float32_copies = pytest.mark.skipif(
    not can_prepack_float32(torch.zeros(2, 2)), reason="this processor has no oneDNN for float32"
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


def choices_of(way, *matrices, directions=("forward", "backward")):
    """Every number of rows of these weights [O, I] goes one way."""
    every_row = dict.fromkeys(MEASURED_ROWS, way)
    return {product_name(matrix, direction): every_row for matrix in matrices for direction in directions}


def matrix_of(module):
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_usable(way, dtype, module, num_rows=1):
    packed = PackedWeight(matrix_of(module), *([None, None] if way != "prepacked" else [torch.zeros(1)] * 2))
    can = can_prepack_float32 if dtype is torch.float32 else can_prepack
    return WAYS[way].applies(packed, "forward", num_rows) and (way != "prepacked" or can(matrix_of(module)))


def forced(way, module):
    """Kernels whose products of the module's weight all go one way."""
    matrix = matrix_of(module)
    if way != "prepacked":
        return FrozenLinearKernels(choices_of(way, matrix))
    kernels = FrozenLinearKernels(choices_of(way, matrix, directions=("forward", "prepacked")))
    kernels.prepack(module, None, both_ways=False)
    return kernels


@pytest.fixture
def ways(monkeypatch):
    """The names of the ways that products have gone, forward or backward."""
    taken = []

    def watched(name, product):
        def run(*args):
            taken.append(name)
            return product(*args)

        return run

    counted = {
        name: replace(way, times=watched(name, way.times), back=watched(name, way.back)) for name, way in WAYS.items()
    }
    monkeypatch.setattr(frozen_linear, "WAYS", counted)
    return taken


TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: ROUNDING}  # of the largest number
EVERY_WAY = pytest.mark.parametrize("way", sorted(WAYS))
BOTH_DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))


@EVERY_WAY
@BOTH_DTYPES
@LAYERS
@pytest.mark.parametrize("shape", [(INPUTS,), (1, INPUTS), (2, INPUTS), (1, 5, INPUTS), (33, INPUTS), (2, 650, INPUTS)])
def test_each_way_gives_the_products_of_float64_forward_and_backward(way, dtype, kind, shape, ways):
    module, inputs = layer(kind, dtype), rows(*shape, dtype=dtype)
    if not is_usable(way, dtype, module, inputs.numel() // INPUTS):
        pytest.skip(f"{way} is no way for this product on this processor")
    with forced(way, module).active():
        found = both_ways(module, inputs)
    exact = copy.deepcopy(module).double()
    vars(exact)["forward"] = partial(type(module).forward, exact)
    pull = rows(*found[0].shape, dtype=dtype, seed=2).double()
    truth = exact(inputs.double()), pull @ matrix_of(exact)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype is dtype
        assert relative_error(ours.double(), theirs) < TOLERANCES[dtype]
        assert relative_error(ours.double(), theirs.flip(-1)) > 0.1  # the control
    is_thin = inputs.numel() // INPUTS <= MAX_NATIVE_ROWS
    taken = way if way != "native" or is_thin else "linear"  # which is there for few rows alone
    assert ways[:1] == ([taken] if way != "linear" else [])  # torch's own product needs no way of ours


@EVERY_WAY
@BOTH_DTYPES
def test_rows_of_a_batch_have_the_products_that_each_has_alone(way, dtype):
    module, inputs = layer("linear", dtype), rows(13, INPUTS, dtype=dtype)
    if not is_usable(way, dtype, module):
        pytest.skip(f"{way} is no way for {dtype} on this processor")
    with forced(way, module).active():
        batch, alone = module(inputs), torch.cat([module(row[None]) for row in inputs])
    assert relative_error(batch, alone) < TOLERANCES[dtype]
    assert relative_error(batch, alone.flip(0)) > 0.1


def test_each_number_of_rows_goes_the_way_of_the_next_measured_one(ways):
    module = layer("linear")
    forward = {1: "linear", 2: "transposed", 4: "transposed", 8: "linear", 1_024: "transposed"}
    chosen = {product_name(module.weight, "forward"): forward}
    with FrozenLinearKernels(chosen).active():
        for num_rows in (1, 2, 3, 4, 5, 8, 300, 2_048):
            module(rows(num_rows, INPUTS))
    # 2,048 rows are multiplied in two parts
    assert ways == [*(["linear"] + 3 * ["transposed"] + 2 * ["linear"]), *(3 * ["transposed"])]


@pytest.mark.parametrize("way", ["prepacked", "no such way"])
def test_a_choice_that_cannot_be_made_here_gives_way_to_the_fixed_rules(way):
    module, inputs = layer("linear"), rows(7, INPUTS)
    with FrozenLinearKernels(choices_of(way, module.weight)).active():
        assert torch.equal(module(inputs), linear(inputs, module.weight, module.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 300])
def test_onednn_gives_the_same_bits_prepacked_and_not(dtype, num_rows):
    module, inputs = layer("linear", dtype), rows(num_rows, INPUTS, dtype=dtype)
    if not is_usable("prepacked", dtype, module):
        pytest.skip(f"nothing is prepacked for {dtype} on this processor")
    chosen = choices_of("onednn", module.weight, directions=("forward", "prepacked"))
    plain, packed = FrozenLinearKernels(chosen), FrozenLinearKernels(chosen)
    packed.prepack(module, None, both_ways=False)
    assert packed.bytes_to_prepack(module, None, both_ways=False) == 0
    with plain.active():
        truth = module(inputs)
    with packed.active():
        assert torch.equal(module(inputs), truth)


@needs_float32_copies
def test_float32_weights_are_prepacked_where_the_choices_say_so_and_never_for_training():
    layers = three_layers(torch.float32)
    chosen = choices_of("prepacked", layers[0].weight, directions=("prepacked",))
    kernels = FrozenLinearKernels(chosen)
    assert kernels.bytes_to_prepack(layers, layers[0].weight, both_ways=True) == 0
    # Two layers have this shape; the Conv1D is stored as [I, O], and is another product.
    assert kernels.bytes_to_prepack(layers, layers[0].weight, both_ways=False) == 2 * layers[0].weight.nbytes
    kernels.prepack(layers, layers[0].weight, both_ways=False)
    assert kernels.bytes_to_prepack(layers, layers[0].weight, both_ways=False) == 0


@needs_prepacking
def test_bfloat16_weights_are_not_prepacked_where_no_choice_uses_the_copy():
    layers = three_layers()
    kernels = FrozenLinearKernels(choices_of("transposed", *(matrix_of(layers[index]) for index in (0, 2, 3))))
    assert kernels.bytes_to_prepack(layers, None) == 0


def test_kernels_with_other_choices_share_the_weights_and_leave_the_first_as_they_were(ways):
    module, inputs = layer("linear"), rows(4, INPUTS)
    first = FrozenLinearKernels(choices_of("transposed", module.weight))
    second = first.with_choices(choices_of("linear", module.weight))
    for kernels in (first, second, first):
        with kernels.active():
            module(inputs)
    assert ways == ["transposed", "transposed"]
    first.choose(choices_of("linear", module.weight))
    with first.active():
        module(inputs)
    assert len(ways) == 2


def test_every_block_of_a_head_goes_the_way_of_one_block(ways):
    head = nn.Linear(INPUTS, 5_000, bias=False).requires_grad_(False)
    name = product_name(head.weight, "forward", HEAD_BLOCK)
    kernels = FrozenLinearKernels({name: dict.fromkeys(MEASURED_ROWS, "transposed")})
    sizes = [block.times(rows(3, INPUTS)).shape for block in kernels.row_blocks(head.weight, 1_800)]
    assert sizes == [(3, 1_800), (3, 1_800), (3, 1_400)]
    assert ways == 3 * ["transposed"]


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
    assert len(calls) == (6 if num_targets else 0)  # three blocks, forward and backward


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
