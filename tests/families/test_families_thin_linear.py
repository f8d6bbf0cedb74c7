"""Our own products of few rows, beside torch's in float64."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from softprompt.families.frozen_linear import FrozenLinearKernels
from softprompt.families.native import native_library
from softprompt.families.patches import RMS_NORMS, install_kernels
from softprompt.families.thin_linear import (
    can_quantise,
    has_thin_linear,
    quantised,
    thin_linear,
)

pytestmark = pytest.mark.skipif(native_library() is None, reason="the C library was not compiled")
SHAPES = [(1, 32), (5, 31), (24, 64), (51, 100), (192, 576), (577, 96)]  # outputs, inputs: whole registers and tails
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 33]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_any_number_of_rows_equal_those_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = matrix(*shape, dtype=dtype), matrix(shape[0], seed=1, dtype=dtype)
    for count in ROWS:
        rows = matrix(count, shape[1], seed=count, dtype=dtype)
        truth = exact(rows, weight, bias)
        tolerance = 1e-5 if dtype is torch.float32 else 8e-3  # bfloat16 rounds the result to 8 bits
        found = thin_linear(rows, weight, bias)
        assert found.dtype is dtype
        assert (found - truth).abs().max() <= tolerance * truth.abs().max()
        assert (thin_linear(rows.flip(1), weight, bias) - truth).abs().max() > 0.01 * truth.abs().max()  # other rows


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_gives_the_same_bits_alone_and_beside_others(shape: tuple[int, int]) -> None:
    weight, rows = matrix(*shape), matrix(9, shape[1], seed=1)
    whole = thin_linear(rows, weight)
    assert all(torch.equal(thin_linear(rows[t : t + 1], weight)[0], whole[t]) for t in range(9))
    assert torch.equal(thin_linear(rows[None], weight)[0], whole)


@pytest.mark.parametrize("count", [1, 3, 6, 7, 20])
def test_a_weight_gives_the_same_bits_in_every_storage_as_its_float32_values_do(count: int) -> None:
    weight, rows = matrix(50, 96), matrix(count, 96, seed=1)
    halves, int8 = weight.to(torch.bfloat16), quantised(weight)
    assert torch.equal(thin_linear(rows, halves), thin_linear(rows, halves.float()))
    assert torch.equal(int8.times(rows), thin_linear(rows, int8.dequantised()))
    assert not torch.equal(int8.times(rows), thin_linear(rows, weight))


def test_int8_numbers_lie_within_half_a_step_of_the_weight() -> None:
    weight = matrix(64, 128) * torch.logspace(-6, 3, 64)[:, None]
    weight[3] = 0
    int8 = quantised(weight)
    steps = int8.scales.float().repeat_interleave(32, dim=1)
    assert ((int8.dequantised() - weight).abs() <= steps * 0.5001).all()
    assert (int8.dequantised()[3] == 0).all()
    largest = weight.abs().unflatten(1, (-1, 32)).amax(-1)
    assert (int8.scales.float() * 127 <= largest * 1.01).all()
    assert int8.num_bytes == 64 * 128 * 34 // 32


def test_only_dense_matrices_of_whole_groups_qualify() -> None:
    assert has_thin_linear(matrix(4, 31))
    assert not has_thin_linear(matrix(4, 31).t())
    assert not has_thin_linear(matrix(4, 31).double())
    assert can_quantise(matrix(4, 64))
    assert not can_quantise(matrix(4, 31))


def test_two_threads_multiply_by_one_weight_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight = quantised(matrix(300, 320))
    inputs = [matrix(count % 7 + 1, 320, seed=count) for count in range(40)]
    alone = [weight.times(rows) for rows in inputs]
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(weight.times, inputs), alone))


@pytest.mark.parametrize("name", RMS_NORMS)
def test_our_rms_norm_is_that_of_each_family_it_replaces(name: str) -> None:
    module = rms_norm_module(name)
    torch.nn.init.normal_(module.weight, 1.0, 0.5)
    for shape in ((1, 1, 40), (7, 40), (64, 40), (65, 40)):  # more rows than 64 are the family's own affair
        hidden = matrix(*shape[:-1], 40, seed=1) * 3
        truth = module(hidden)
        install_kernels(module)
        with torch.no_grad(), FrozenLinearKernels().active():
            found = module(hidden)
        vars(module).pop("forward")
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=1e-7)
        assert (found - truth.flip(-1)).abs().max() > 0.1


def rms_norm_module(name: str) -> Any:
    """An instance, 40 wide, of the class of that name in one of transformers' model files."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        if f"class {name}(" in file.read_text(encoding="utf-8"):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            return getattr(module, name)(40)
    return pytest.skip(f"this transformers has no {name}")


def test_a_norm_with_gradient_is_the_familys_own() -> None:
    module = rms_norm_module("LlamaRMSNorm")
    hidden = matrix(3, 40).requires_grad_(True)
    install_kernels(module)
    with FrozenLinearKernels().active():
        module(hidden).sum().backward()
    assert hidden.grad is not None


@pytest.mark.medium
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_products_for_older_processors_pass_these_tests_too(capability: str) -> None:
    """torch's own switch says which of the compiled products are used; a processor without AVX2 has the last alone."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    shown = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    ran = subprocess.run([sys.executable, "-c", shown], env=environment, capture_output=True, text=True, check=True)
    if ran.stdout.strip() != capability:
        pytest.skip(f"torch cannot be held to {capability} on this processor")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not medium",
        "-k",
        "not norm",
        __file__,
    ]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-2000:]
    assert again.stdout.count(".") > 20
    assert "[100%]" in again.stdout
