"""Products with the frozen weights of a base, by the fastest exact way that torch has on this processor.

Two things are lost on CPUs by plain calls (figures in `docs/performance.md`). torch sends float32 products on x86 to
MKL, which on a Zen 5 reached half the rate of oneDNN, which torch carries too.
And oneDNN arranges a bfloat16 weight anew for every product; a frozen weight can be kept in its arrangement, at the
price of a copy for the forward and one for the backward direction (`Products.arrange`).

What runs depends on the processor and on `arrange` alone: float32 is never arranged, and bfloat16 gave the same bits
arranged and not wherever it was looked at. Nothing is installed: inside `Products.active()` this thread's calls of
torch's linear functions are seen and answered.

T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

_ROW_BLOCK = 2_048  # rows of an arranged head that are multiplied at once
_WORTH_ONEDNN = 2**19  # numbers of a weight: oneDNN compiles a kernel for every new number of rows, 0.3 ms each
_THREAD = threading.local()

Storage = tuple[int, tuple[int, ...], tuple[int, ...]]  # where a weight lies: address, shape, strides


@dataclass(frozen=True)
class Matrix:
    """One frozen weight [O, I]; `forward` and `backward` hold it as oneDNN wants it, else it runs as it is."""

    weight: Tensor
    forward: Tensor | None = None
    backward: Tensor | None = None

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, O] of rows [T, I], without gradient."""
        weight = self.weight if self.forward is None else self.forward
        return _onednn(rows, weight, bias) if self._is_fast(rows) else torch.nn.functional.linear(rows, weight, bias)

    def back(self, grads: Tensor) -> Tensor:
        """[T, I] of gradients [T, O], without gradient."""
        if not self._is_fast(grads):
            return grads @ self.weight
        return _onednn(grads.contiguous(), self.weight.t() if self.backward is None else self.backward, None)

    def _is_fast(self, rows: Tensor) -> bool:
        return self.forward is not None or (rows.numel() > 0 and _takes_onednn(self.weight))


class Products:
    """How the products of one base run."""

    def __init__(self) -> None:
        self._arranged: dict[Storage, Matrix] = {}
        self._heads: dict[Storage, list[Matrix]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside it this thread's linear functions with frozen weights take these products."""
        before = current()
        _THREAD.products = self
        try:
            with _FrozenProducts(self) if self._arranged or float32_takes_onednn() else contextlib.nullcontext():
                yield
        finally:
            _THREAD.products = before

    def arrange(self, layers: nn.Module, head: Tensor | None) -> None:
        """Keep the bfloat16 weights of the linear layers, and of the head [V, D], as oneDNN wants them.

        Takes twice the memory of the weights, besides them. Does nothing where it would not help.
        """
        for module in _linear_layers(layers):
            weight = module.weight.detach()
            matrix = weight if isinstance(module, nn.Linear) else weight.t()
            self._arranged[_storage(weight)] = arranged(matrix)
        if head is not None and can_arrange(head):
            self._heads[_storage(head)] = [arranged(block) for block in head.split(_ROW_BLOCK)]

    def bytes_to_arrange(self, layers: nn.Module, head: Tensor | None) -> int:
        """What `arrange` would take; 0 where it has been done."""
        weights = [module.weight for module in _linear_layers(layers)]
        if head is not None and can_arrange(head):
            weights.append(head)
        return 0 if self._arranged else sum(2 * weight.numel() * weight.element_size() for weight in weights)

    def is_arranged(self, weight: Tensor) -> bool:
        return bool(self._arranged) and _storage(weight) in self._arranged

    def matrix(self, weight: Tensor, is_transposed: bool = False) -> Matrix:
        """The matrix [O, I] of a weight, which is stored as [I, O] where `is_transposed`."""
        found = self._arranged.get(_storage(weight))
        return found if found is not None else Matrix(weight.t() if is_transposed else weight)

    def row_blocks(self, head: Tensor, size: int) -> list[Matrix]:
        """The head [V, D] in blocks of rows, about `size` each."""
        found = self._heads.get(_storage(head))
        return found if found is not None else [Matrix(block) for block in head.split(size)]


def current() -> Products | None:
    """The products that this thread is inside of."""
    found: Products | None = getattr(_THREAD, "products", None)
    return found


def can_arrange(weight: Tensor) -> bool:
    """A bfloat16 matrix on a CPU that multiplies bfloat16 by itself."""
    ops = torch.ops.mkldnn
    here = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and weight.dim() == 2
    return here and hasattr(ops, "_reorder_linear_weight") and ops._is_mkldnn_bf16_supported()


def _linear_layers(layers: nn.Module) -> list[nn.Linear | Conv1D]:
    """Those that multiply as torch's and transformers' own do; a subclass may do it in a way of its own."""
    return [
        module
        for module in layers.modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module) in (nn.Linear, Conv1D) and can_arrange(module.weight)
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


def arranged(matrix: Tensor) -> Matrix:
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return Matrix(matrix, reorder(matrix.contiguous(), _ROW_BLOCK), reorder(matrix.t().contiguous(), _ROW_BLOCK))


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix  # frozen: nothing changes it before the backward pass
        return matrix.times(rows, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.matrix.back(grad), None, None


class _FrozenProducts(TorchFunctionMode):
    def __init__(self, products: Products) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            found = self._answer(args[0], args[1], args[2] if len(args) > 2 else None, is_transposed=False)
        elif func is torch.addmm and not kwargs:  # transformers' Conv1D
            found = self._answer(args[1], args[2], args[0], is_transposed=True)
        else:
            found = None
        return func(*args, **(kwargs or {})) if found is None else found

    def _answer(self, rows: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor | None:
        is_known = _takes_onednn(weight) or self.products.is_arranged(weight)
        is_free = weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dim() != 1))
        if not is_known or is_free or rows.dtype is not weight.dtype or rows.numel() == 0:
            return None
        matrix = self.products.matrix(weight, is_transposed)
        found: Tensor = _FrozenLinear.apply(rows, matrix, bias)  # type: ignore[no-untyped-call]
        return found
