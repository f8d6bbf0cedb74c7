"""FrozenLinearKernels with the frozen weights of a base, by the fastest exact way that torch has on this processor.

Two things are lost on CPUs by plain calls (figures in `docs/performance.md`). torch sends float32 products on x86 to
MKL, which on a Zen 5 reached half the rate of oneDNN, which torch carries too.
And oneDNN arranges a bfloat16 weight anew for every product; a frozen weight can be kept in its arrangement, at the
price of a copy for the forward and one for the backward direction (`FrozenLinearKernels.prepack`).

What runs depends on the processor and on `prepack` alone: float32 is never arranged, and bfloat16 gave the same bits
arranged and not wherever it was looked at. Installed once per linear layer; outside of `active()` the layer's
own product runs.

T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softprompt.compute_share import yield_point
from softprompt.families.huge_pages import on_huge_pages

_ROW_BLOCK = 2_048  # rows of an arranged head that are multiplied at once
_MOST_ROWS = 1_024  # of tokens in one product: more of them are a long time without a breath
_WORTH_ONEDNN = 2**19  # numbers of a weight: oneDNN compiles a kernel for every new number of rows, 0.3 ms each
_THREAD = threading.local()

Storage = tuple[int, tuple[int, ...], tuple[int, ...]]  # where a weight lies: address, shape, strides


@dataclass(frozen=True)
class PackedWeight:
    """One frozen weight [O, I]; `forward` and `backward` hold it as oneDNN wants it, else it runs as it is."""

    weight: Tensor
    forward: Tensor | None = None
    backward: Tensor | None = None

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, O] of rows [T, I], without gradient."""
        if _are_many(rows):
            return torch.cat([self.times(part, bias) for part in _parts(rows)], dim=-2)
        weight = self.weight if self.forward is None else self.forward
        return _onednn(rows, weight, bias) if self._is_fast(rows) else torch.nn.functional.linear(rows, weight, bias)

    def back(self, grads: Tensor) -> Tensor:
        """[T, I] of gradients [T, O], without gradient."""
        if _are_many(grads):
            return torch.cat([self.back(part) for part in _parts(grads)], dim=-2)
        if not self._is_fast(grads):
            return grads @ self.weight
        return _onednn(grads.contiguous(), self.weight.t() if self.backward is None else self.backward, None)

    def _is_fast(self, rows: Tensor) -> bool:
        return self.forward is not None or (rows.numel() > 0 and _takes_onednn(self.weight))


def _are_many(rows: Tensor) -> bool:
    return rows.dim() > 1 and rows.shape[-2] > _MOST_ROWS and rows.device.type == "cpu"


def _parts(rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(_MOST_ROWS, dim=-2):
        yield_point()
        yield part


class FrozenLinearKernels:
    """How the products of one base run."""

    def __init__(self) -> None:
        self._packed: dict[Storage, PackedWeight] = {}
        self._known: dict[Tensor, PackedWeight | None] = {}  # by the parameter itself: what `_packed` holds of it
        self._heads: dict[Storage, list[PackedWeight]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside it the linear layers that this thread calls take these products."""
        before = active_kernels()
        _THREAD.products = self
        try:
            yield
        finally:
            _THREAD.products = before

    def prepack(self, layers: nn.Module, head: Tensor | None) -> None:
        """Keep the bfloat16 weights of the linear layers, and of the head [V, D], as oneDNN wants them.

        Takes twice the memory of the weights, besides them. Does nothing where it would not help.
        """
        with on_huge_pages():
            self._prepack_layers(layers, both_ways=True)
            if head is not None and can_prepack(head):
                self._heads[_storage(head)] = [packed_weight(block) for block in head.split(_ROW_BLOCK)]

    def prepack_forward(self, layers: nn.Module, head: Tensor | None) -> None:
        """The same for a base that only answers: once the memory of the weights, besides them."""
        with on_huge_pages():
            self._prepack_layers(layers, both_ways=False)
            if head is not None and can_prepack(head) and not self._is_kept(head):
                self._packed[_storage(head)] = packed_weight(head, both_ways=False)

    def _prepack_layers(self, layers: nn.Module, both_ways: bool) -> None:
        self._known.clear()
        for module in _linear_layers(layers):
            yield_point()
            weight = module.weight.detach()
            found = self._packed.get(_storage(weight))
            if found is None or (both_ways and found.backward is None):
                matrix = weight if isinstance(module, nn.Linear) else weight.t()
                self._packed[_storage(weight)] = packed_weight(matrix, both_ways, found)

    def bytes_to_prepack(self, layers: nn.Module, head: Tensor | None, both_ways: bool = True) -> int:
        """What `prepack`, or `prepack_forward`, would take; 0 where it has been done."""
        weights = [module.weight.detach() for module in _linear_layers(layers)]
        kept = [self._packed.get(_storage(weight)) for weight in weights]
        missing = [(found is None) + (both_ways and (found is None or found.backward is None)) for found in kept]
        if head is not None and can_prepack(head):
            is_kept = _storage(head) in self._heads if both_ways else self._is_kept(head)
            weights, missing = [*weights, head], [*missing, 0 if is_kept else 1 + both_ways]
        return sum(
            count * weight.numel() * weight.element_size() for count, weight in zip(missing, weights, strict=True)
        )

    def _is_kept(self, head: Tensor) -> bool:
        return _storage(head) in self._heads or _storage(head) in self._packed

    def head_blocks(self, head: Tensor) -> list[PackedWeight] | None:
        """The arranged blocks of rows of a head that is not arranged as a whole."""
        return None if _storage(head) in self._packed else self._heads.get(_storage(head))

    def matrix(self, weight: Tensor, is_transposed: bool = False) -> PackedWeight | None:
        """The matrix [O, I] of a frozen weight, which is stored as [I, O] where `is_transposed`; None where torch's own
        product is as good."""
        if weight not in self._known:
            found = self._packed.get(_storage(weight))
            if found is None and _takes_onednn(weight):
                found = PackedWeight(weight.t() if is_transposed else weight)
            self._known[weight] = found
        return self._known[weight]

    def row_blocks(self, head: Tensor, size: int) -> list[PackedWeight]:
        """The head [V, D] in blocks of rows, about `size` each."""
        found = self._heads.get(_storage(head))
        return found if found is not None else [PackedWeight(block) for block in head.split(size)]


def active_kernels() -> FrozenLinearKernels | None:
    """The products that this thread is inside of."""
    found: FrozenLinearKernels | None = getattr(_THREAD, "products", None)
    return found


def can_prepack(weight: Tensor) -> bool:
    """A bfloat16 matrix on a CPU that multiplies bfloat16 by itself."""
    ops = torch.ops.mkldnn
    here = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and weight.dim() == 2
    return here and hasattr(ops, "_reorder_linear_weight") and ops._is_mkldnn_bf16_supported()


def _linear_layers(layers: nn.Module) -> list[nn.Linear | Conv1D]:
    """Those that multiply as torch's and transformers' own do; a subclass may do it in a way of its own."""
    return [
        module
        for module in layers.modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module) in (nn.Linear, Conv1D) and can_prepack(module.weight)
    ]


def _storage(weight: Tensor) -> Storage:
    return weight.data_ptr(), tuple(weight.shape), weight.stride()


@cache
def float32_takes_onednn() -> bool:
    """An x86 processor with AVX-512 that is not Intel's."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    if platform.system() != "Linux" or not has_avx512 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _takes_onednn(weight: Tensor) -> bool:
    is_plain = weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.dim() == 2
    return is_plain and weight.numel() >= _WORTH_ONEDNN and float32_takes_onednn()


def packed_weight(matrix: Tensor, both_ways: bool = True, found: PackedWeight | None = None) -> PackedWeight:
    """The matrix [O, I] with what oneDNN wants for the forward direction and for the backward one; `found` has some."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    forward = found.forward if found is not None else reorder(matrix.contiguous(), _ROW_BLOCK)
    return PackedWeight(matrix, forward, reorder(matrix.t().contiguous(), _ROW_BLOCK) if both_ways else None)


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix  # frozen: nothing changes it before the backward pass
        return matrix.times(rows, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        yield_point()
        return ctx.matrix.back(grad), None, None


def install(model: nn.Module) -> None:
    """Put our products before those of each linear layer; outside of `active()` the layer's own run."""
    for module in model.modules():
        if type(module) in _FORWARDS and "forward" not in vars(module):
            module.forward = MethodType(_FORWARDS[type(module)], module)


def _linear(module: nn.Linear, rows: Tensor) -> Tensor:
    products = active_kernels()
    found = None if products is None else _answer(products, rows, module.weight, module.bias, is_transposed=False)
    return nn.Linear.forward(module, rows) if found is None else found


def _conv1d(module: Conv1D, rows: Tensor) -> Tensor:
    products = active_kernels()
    found = None if products is None else _answer(products, rows, module.weight, module.bias, is_transposed=True)
    whole: Tensor = Conv1D.forward(module, rows) if found is None else found
    return whole


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: _linear, Conv1D: _conv1d}


def _answer(
    products: FrozenLinearKernels, rows: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool
) -> Tensor | None:
    """The product, where it is one of ours."""
    yield_point()
    is_free = weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dim() != 1))
    if is_free or rows.dtype is not weight.dtype or rows.numel() == 0:
        return None
    matrix = products.matrix(weight, is_transposed)
    if matrix is None:
        return None
    if not torch.is_grad_enabled():
        return matrix.times(rows, bias)
    found: Tensor = _FrozenLinear.apply(rows, matrix, bias)  # type: ignore[no-untyped-call]
    return found
