"""Products with the frozen weights of a base, by the fastest exact kernels that torch has on this processor.

Plain calls lose time in three ways on a CPU (figures in `docs/performance.md`). torch sends float32 products on x86 to
MKL, which on a Zen 5 reached half the rate of oneDNN, which torch ships too. oneDNN reorders a bfloat16 weight for
every product; a frozen weight can be prepacked, at the price of a copy for the forward direction and one for the
backward (`FrozenLinearKernels.prepack`). And a product with few rows reads each weight once: with pages of 4 KiB the
processor spends up to half of that time on address translation, so prepacked weights are put on huge pages.

Which kernel runs depends on the processor and on `prepack` alone: float32 is never prepacked, and bfloat16 gave the
same bits prepacked and not wherever it was compared. The kernels run only inside `FrozenLinearKernels.active()`;
outside of it each layer computes as it always did.

T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softprompt.compute_share import yield_point

HEAD_BLOCK = 2_048  # rows of a prepacked head that are multiplied at once
_MOST_ROWS = 1_024  # of tokens in one product: with more of them it is long until the next yield point
WORTH_ONEDNN = 2**19  # numbers of a weight: oneDNN compiles a kernel for every new number of rows, 0.3 ms each
_HUGE_PAGE = 2**21
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h; the second since Linux 6.1
_THREAD = threading.local()

Storage = tuple[int, tuple[int, ...], tuple[int, ...]]  # identifies a weight: address, shape, strides
Span = tuple[int, int]  # first address, and the one after the last


@dataclass(frozen=True)
class PackedWeight:
    """One frozen weight [O, I]; `forward` and `backward` are oneDNN's own copies, None where it is used as it is."""

    weight: Tensor
    forward: Tensor | None = None
    backward: Tensor | None = None

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, O] of rows [T, I], without gradient."""
        if _are_many(rows):
            return torch.cat([self.times(part, bias) for part in _parts(rows)], dim=-2)
        weight = self.weight if self.forward is None else self.forward
        return (
            onednn_linear(rows, weight, bias) if self._is_fast(rows) else torch.nn.functional.linear(rows, weight, bias)
        )

    def back(self, grads: Tensor) -> Tensor:
        """[T, I] of gradients [T, O], without gradient."""
        if _are_many(grads):
            return torch.cat([self.back(part) for part in _parts(grads)], dim=-2)
        if not self._is_fast(grads):
            return grads @ self.weight
        return onednn_linear(grads.contiguous(), self.weight.t() if self.backward is None else self.backward, None)

    def _is_fast(self, rows: Tensor) -> bool:
        return self.forward is not None or (rows.numel() > 0 and _takes_onednn(self.weight))


def _are_many(rows: Tensor) -> bool:
    return rows.dim() > 1 and rows.shape[-2] > _MOST_ROWS and rows.device.type == "cpu"


def _parts(rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(_MOST_ROWS, dim=-2):
        yield_point()
        yield part


class FrozenLinearKernels:
    """How the linear layers of one base are computed."""

    def __init__(self) -> None:
        self._packed: dict[Storage, PackedWeight] = {}
        self._found: dict[Tensor, PackedWeight | None] = {}  # by the parameter itself: what `weight` returns for it
        self._heads: dict[Storage, list[PackedWeight]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside it the linear layers that this thread calls use these kernels."""
        before = active_kernels()
        _THREAD.kernels = self
        try:
            yield
        finally:
            _THREAD.kernels = before

    def prepack(self, layers: nn.Module, head: Tensor | None, both_ways: bool = True) -> None:
        """Keep a copy of the bfloat16 weights of the linear layers, and of the head [V, D], in oneDNN's layout.

        Takes the memory of the weights once more, and twice with `both_ways`, which training needs. Does nothing where
        it would not help.
        """
        with _on_huge_pages():
            self._prepack_layers(layers, both_ways)
            if head is None or not can_prepack(head):
                return
            if both_ways:
                self._heads[_storage(head)] = [packed_weight(block) for block in head.split(HEAD_BLOCK)]
            elif not self._has_head(head):
                self._packed[_storage(head)] = packed_weight(head, both_ways=False)

    def _prepack_layers(self, layers: nn.Module, both_ways: bool) -> None:
        self._found.clear()
        for module in _linear_layers(layers):
            yield_point()
            weight = module.weight.detach()
            found = self._packed.get(_storage(weight))
            if found is None or (both_ways and found.backward is None):
                matrix = weight if isinstance(module, nn.Linear) else weight.t()
                self._packed[_storage(weight)] = packed_weight(matrix, both_ways, found)

    def bytes_to_prepack(self, layers: nn.Module, head: Tensor | None, both_ways: bool = True) -> int:
        """Memory that `prepack` would take; 0 once it has been done."""
        weights = [module.weight.detach() for module in _linear_layers(layers)]
        kept = [self._packed.get(_storage(weight)) for weight in weights]
        missing = [(found is None) + (both_ways and (found is None or found.backward is None)) for found in kept]
        if head is not None and can_prepack(head):
            is_kept = _storage(head) in self._heads if both_ways else self._has_head(head)
            weights, missing = [*weights, head], [*missing, 0 if is_kept else 1 + both_ways]
        return sum(
            count * weight.numel() * weight.element_size() for count, weight in zip(missing, weights, strict=True)
        )

    def _has_head(self, head: Tensor) -> bool:
        return _storage(head) in self._heads or _storage(head) in self._packed

    def head_blocks(self, head: Tensor) -> list[PackedWeight] | None:
        """The prepacked row blocks of a head that is not prepacked as a whole."""
        return None if _storage(head) in self._packed else self._heads.get(_storage(head))

    def weight(self, weight: Tensor, is_transposed: bool = False) -> PackedWeight | None:
        """The packed weight [O, I] of a frozen weight, which is stored as [I, O] where `is_transposed`; None where
        torch's own product is as good."""
        if weight not in self._found:
            found = self._packed.get(_storage(weight))
            if found is None and _takes_onednn(weight):
                found = PackedWeight(weight.t() if is_transposed else weight)
            self._found[weight] = found
        return self._found[weight]

    def row_blocks(self, head: Tensor, size: int) -> list[PackedWeight]:
        """The head [V, D] in blocks of rows, about `size` each."""
        found = self._heads.get(_storage(head))
        return found if found is not None else [PackedWeight(block) for block in head.split(size)]


def active_kernels() -> FrozenLinearKernels | None:
    """The kernels that this thread uses now."""
    found: FrozenLinearKernels | None = getattr(_THREAD, "kernels", None)
    return found


def frozen_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool = False) -> Tensor | None:
    """[T, O] of rows [T, I] by the active kernels; None where they have no better way than the layer itself."""
    kernels = active_kernels()
    if kernels is None:
        return None
    yield_point()
    is_trained = weight.requires_grad or (bias is not None and (bias.requires_grad or bias.dim() != 1))
    if is_trained or rows.dtype is not weight.dtype or rows.numel() == 0:
        return None
    packed = kernels.weight(weight, is_transposed)
    if packed is None:
        return None
    if not torch.is_grad_enabled():
        return packed.times(rows, bias)
    found: Tensor = _FrozenLinear.apply(rows, packed, bias)  # type: ignore[no-untyped-call]
    return found


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.packed = packed  # frozen: nothing changes it before the backward pass
        return packed.times(rows, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        yield_point()
        return ctx.packed.back(grad), None, None


def can_prepack(weight: Tensor) -> bool:
    """True for a bfloat16 matrix on a CPU that has bfloat16 products."""
    ops = torch.ops.mkldnn
    here = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and weight.dim() == 2
    return here and hasattr(ops, "_reorder_linear_weight") and ops._is_mkldnn_bf16_supported()


def packed_weight(matrix: Tensor, both_ways: bool = True, found: PackedWeight | None = None) -> PackedWeight:
    """The matrix [O, I] with oneDNN's copies for one direction or both; `found` has the forward one already."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    forward = found.forward if found is not None else reorder(matrix.contiguous(), HEAD_BLOCK)
    return PackedWeight(matrix, forward, reorder(matrix.t().contiguous(), HEAD_BLOCK) if both_ways else None)


def _linear_layers(layers: nn.Module) -> list[nn.Linear | Conv1D]:
    """Those that multiply as torch's and transformers' own do; a subclass may compute something else."""
    return [
        module
        for module in layers.modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module) in (nn.Linear, Conv1D) and can_prepack(module.weight)
    ]


def _storage(weight: Tensor) -> Storage:
    return weight.data_ptr(), tuple(weight.shape), weight.stride()


@cache
def float32_takes_onednn() -> bool:
    """True on an x86 processor with AVX-512 that is not Intel's."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    if platform.system() != "Linux" or not has_avx512 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _takes_onednn(weight: Tensor) -> bool:
    is_plain = weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.dim() == 2
    return is_plain and weight.numel() >= WORTH_ONEDNN and float32_takes_onednn()


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


@contextlib.contextmanager
def _on_huge_pages() -> Iterator[None]:
    """Ask Linux to put the anonymous memory that the block takes and keeps on pages of 2 MiB; elsewhere do nothing."""
    before = _anonymous_memory()
    yield
    for span in _anonymous_memory():
        for first, last in _without(span, before):
            _advise(-(-first // _HUGE_PAGE) * _HUGE_PAGE, last // _HUGE_PAGE * _HUGE_PAGE)


def _anonymous_memory() -> list[Span]:
    """This process's writable memory that belongs to no file."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [_span(line) for line in lines if _is_anonymous(line.split())]


def _is_anonymous(parts: list[str]) -> bool:
    """`parts`: addresses, permissions, offset, device, inode, and a name where there is one."""
    return parts[1].startswith("rw") and parts[4] == "0" and (len(parts) == 5 or parts[5] == "[heap]")


def _span(line: str) -> Span:
    first, last = line.split(maxsplit=1)[0].split("-")
    return int(first, 16), int(last, 16)


def _without(span: Span, taken: list[Span]) -> Iterator[Span]:
    """The parts of a span that lie in none of the others, which are in order."""
    first, last = span
    for other_first, other_last in taken:
        if other_last <= first or other_first >= last:
            continue
        if other_first > first:
            yield first, other_first
        first = max(first, other_last)
    if first < last:
        yield first, last


def _advise(first: int, last: int) -> None:
    if last <= first:
        return
    madvise = ctypes.CDLL(None).madvise
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
