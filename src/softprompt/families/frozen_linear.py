"""Products with the frozen weights of a base: the exact ways that there are on this processor, and their use.

Plain calls lose time in three ways on a CPU (figures in `docs/performance.md`). torch sends float32 products on x86 to
MKL, which on a Zen 5 reached half the rate of oneDNN, which torch ships too, and reads a weight several times for a few
rows. oneDNN reorders a weight for every product; a frozen weight can be prepacked, at the price of a copy for the
forward direction and one for the backward (`FrozenLinearKernels.prepack`). And a product with few rows reads each
weight once, so prepacked weights are put on huge pages.

`WAYS` are the ways, `Choices` say which one each product runs (`softprompt.families.kernel_choice` measures them); a
product that they do not name follows fixed rules by the kind of processor. The choice depends on shape, dtype and
number of rows, and gives the same bits whether a weight is prepacked or not, but for the choices under `PREPACKED`,
which are left out in training. All of it happens only inside `FrozenLinearKernels.active()`; outside of it each layer
computes as it always did.

T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import platform
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softprompt.compute_share import yield_point
from softprompt.families.huge_pages import on_huge_pages
from softprompt.families.thin_linear import MAX_ROWS as MAX_NATIVE_ROWS
from softprompt.families.thin_linear import Int8Weight, can_quantise, has_thin_linear, quantised, thin_linear

HEAD_BLOCK = 2_048  # rows of a prepacked head that are multiplied at once
MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1_024)  # of tokens; other numbers are chosen for as the next of these
MAX_INT8_ROWS = 32  # from here on a product computes for longer than it reads, and int8 gains nothing
_MOST_ROWS = 1_024  # of tokens in one product: with more of them it is long until the next yield point
WORTH_ONEDNN = 2**19  # numbers of a weight: oneDNN compiles a kernel for every new number of rows, 0.3 ms each
_THREAD = threading.local()

Storage = tuple[int, tuple[int, ...], tuple[int, ...]]  # identifies a weight: address, shape, strides
Direction = Literal["forward", "backward", "prepacked"]
FORWARD: Direction = "forward"
BACKWARD: Direction = "backward"
PREPACKED: Direction = (
    "prepacked"  # forward, of a weight that is: what may be chosen for a few rows in place of FORWARD
)
Choices = Mapping[str, Mapping[int, str]]  # by `product_name` and one of MEASURED_ROWS: the name of a way
# as torch's own product gives; its sums in another order; the sums of a rounded weight
Exactness = Literal["same bits", "rounding", "int8"]


@dataclass(frozen=True)
class PackedWeight:
    """One frozen weight [O, I]; `forward` and `backward` are oneDNN's own copies, None where it is used as it is.

    `int8` is the weight rounded, for few rows where the kernels are to use it (`FrozenLinearKernels.with_int8`).
    """

    weight: Tensor
    forward: Tensor | None = None
    backward: Tensor | None = None
    int8: Int8Weight | None = None
    choices: Choices = field(default_factory=dict)
    block_of: int | None = None  # O as its product is named, for a block of a head that is cut differently each time
    _times: dict[int, Times] = field(default_factory=dict, init=False, repr=False, compare=False)  # by rows
    _back: dict[int, Back] = field(default_factory=dict, init=False, repr=False, compare=False)

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, O] of rows [T, I], without gradient."""
        if _are_many(rows):
            return torch.cat([self.times(part, bias) for part in _parts(rows)], dim=-2)
        num_rows = rows.numel() // self.weight.shape[1]
        found = self._times.get(num_rows)
        if found is None:
            found = self._times[num_rows] = WAYS[self.way(FORWARD, num_rows)].times
        return found(self, rows, bias)

    def back(self, grads: Tensor) -> Tensor:
        """[T, I] of gradients [T, O], without gradient."""
        if _are_many(grads):
            return torch.cat([self.back(part) for part in _parts(grads)], dim=-2)
        num_rows = grads.numel() // self.weight.shape[0]
        found = self._back.get(num_rows)
        if found is None:
            found = self._back[num_rows] = WAYS[self.way(BACKWARD, num_rows)].back
        return found(self, grads)

    def way(self, direction: Direction, num_rows: int) -> str:
        """The name of the way that so many rows take."""
        if num_rows == 0:
            return "linear"
        if self.int8 is not None and direction == FORWARD and num_rows <= MAX_INT8_ROWS:
            return "int8"
        chosen = self._chosen(direction, num_rows)
        way = None if chosen is None else WAYS.get(chosen)
        is_usable = way is not None and way.applies(self, direction, num_rows)
        return chosen if chosen is not None and is_usable else self._by_fixed_rules(direction)

    @property
    def is_plain(self) -> bool:
        """Whether all its products are torch's own."""
        ways = {self.way(direction, rows) for direction in (FORWARD, BACKWARD) for rows in MEASURED_ROWS}
        return ways == {"linear"}

    def _chosen(self, direction: Direction, num_rows: int) -> str | None:
        rows = MEASURED_ROWS[min(bisect_left(MEASURED_ROWS, num_rows), len(MEASURED_ROWS) - 1)]
        packed = (
            self.choices.get(self._name(PREPACKED), {}) if direction == FORWARD and self.forward is not None else {}
        )
        return packed.get(rows) or self.choices.get(self._name(direction), {}).get(rows)

    def _name(self, direction: Direction) -> str:
        return product_name(self.weight, direction, self.block_of)

    def _by_fixed_rules(self, direction: Direction) -> str:
        copy = self.forward if direction == FORWARD else self.backward
        return "onednn" if copy is not None or _takes_onednn(self.weight) else "linear"


Times = Callable[[PackedWeight, Tensor, "Tensor | None"], Tensor]  # rows [T, I] and a bias to [T, O]
Back = Callable[[PackedWeight, Tensor], Tensor]  # gradients [T, O] to [T, I]


@dataclass(frozen=True)
class Way:
    """One way to multiply by a frozen weight and by its transpose."""

    times: Times
    back: Back
    applies: Callable[[PackedWeight, Direction, int], bool]  # to so many rows
    exactness: Exactness


def product_name(weight: Tensor, direction: Direction, outputs: int | None = None) -> str:
    """What a product of a weight [O, I] is chosen by, such as `forward 1536x576 float32`."""
    is_transposed = not weight.is_contiguous() and weight.t().is_contiguous()
    dtype = str(weight.dtype).removeprefix("torch.")
    shape = f"{weight.shape[0] if outputs is None else outputs}x{weight.shape[1]}"
    return f"{direction} {shape} {dtype}" + (" transposed" if is_transposed else "")


def _linear(packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, packed.weight, bias)


def _linear_back(packed: PackedWeight, grads: Tensor) -> Tensor:
    return grads @ packed.weight


def _onednn(packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    if packed.weight.dtype is torch.bfloat16:  # torch's own is oneDNN's
        return _linear(packed, rows, bias) if packed.forward is None else onednn_linear(rows, packed.forward, bias)
    is_one = rows.numel() == rows.shape[-1]  # whose sums are others with a prepacked weight
    weight = packed.weight if packed.forward is None or is_one else packed.forward
    return onednn_linear(rows, weight, bias)


def _onednn_back(packed: PackedWeight, grads: Tensor) -> Tensor:
    if packed.backward is None and packed.weight.dtype is torch.bfloat16:
        return grads @ packed.weight
    weight = packed.weight.t() if packed.backward is None else packed.backward
    return onednn_linear(grads.contiguous(), weight, None)


def _prepacked(packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    assert packed.forward is not None
    return onednn_linear(rows, packed.forward, bias)


def _transposed(packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    """(w @ x.T).T: MKL reads the weight once for two to some eight rows, where `linear` reads it for each."""
    columns = rows.reshape(-1, rows.shape[-1]).t()
    out = packed.weight @ columns if bias is None else torch.addmm(bias[:, None], packed.weight, columns)
    return out.t().contiguous().view(*rows.shape[:-1], -1)


def _transposed_back(packed: PackedWeight, grads: Tensor) -> Tensor:
    columns = grads.reshape(-1, grads.shape[-1]).t()
    return (packed.weight.t() @ columns).t().contiguous().view(*grads.shape[:-1], -1)


def _native(packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    return thin_linear(rows, packed.weight, bias)


def _int8(packed: PackedWeight, rows: Tensor, bias: Tensor | None) -> Tensor:
    assert packed.int8 is not None
    return thin_linear(rows, packed.int8.numbers, bias, packed.int8.scales)


def _is_thin(packed: PackedWeight, direction: Direction, num_rows: int) -> bool:
    return direction != BACKWARD and num_rows <= MAX_NATIVE_ROWS and has_thin_linear(packed.weight)


def _has_int8(packed: PackedWeight, direction: Direction, num_rows: int) -> bool:
    return direction == FORWARD and packed.int8 is not None and num_rows <= MAX_INT8_ROWS


def _on_cpu(packed: PackedWeight, direction: Direction, num_rows: int) -> bool:
    return packed.weight.device.type == "cpu" and packed.weight.dtype in (torch.float32, torch.bfloat16)


def _has_onednn(packed: PackedWeight, direction: Direction, num_rows: int) -> bool:
    if packed.weight.dtype is torch.bfloat16:
        return can_prepack(packed.weight)
    return packed.weight.dtype is torch.float32 and packed.weight.device.type == "cpu" and _onednn_is_there()


def _is_prepacked(packed: PackedWeight, direction: Direction, num_rows: int) -> bool:
    return direction != BACKWARD and packed.forward is not None


WAYS: Mapping[str, Way] = {
    "linear": Way(_linear, _linear_back, lambda packed, direction, num_rows: True, "same bits"),
    "onednn": Way(_onednn, _onednn_back, _has_onednn, "rounding"),
    "prepacked": Way(_prepacked, _onednn_back, _is_prepacked, "rounding"),
    "transposed": Way(_transposed, _transposed_back, _on_cpu, "rounding"),
    "native": Way(_native, _linear_back, _is_thin, "rounding"),
    "int8": Way(_int8, _linear_back, _has_int8, "int8"),
}


def _are_many(rows: Tensor) -> bool:
    return rows.dim() > 1 and rows.shape[-2] > _MOST_ROWS and rows.device.type == "cpu"


def _parts(rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(_MOST_ROWS, dim=-2):
        yield_point()
        yield part


class FrozenLinearKernels:
    """How the linear layers of one base are computed, by the given choices."""

    def __init__(self, choices: Choices | None = None) -> None:
        self.choices: Choices = choices or {}
        self._packed: dict[Storage, PackedWeight] = {}
        self._found: dict[Tensor, PackedWeight | None] = {}  # by the parameter itself: what `weight` returns for it
        self._heads: dict[Storage, list[PackedWeight]] = {}
        self._family = WeakSet([self])  # all kernels of these weights but int8 ones
        self._int8: dict[Storage, Int8Weight] = {}  # all that `with_int8` has made
        self._uses_int8 = False

    def with_int8(self, layers: nn.Module, head: Tensor | None) -> FrozenLinearKernels:
        """The same kernels, but that up to MAX_INT8_ROWS rows are multiplied by int8 weights of the linear layers and
        the head [V, D]; these are made once. A weight that `can_quantise` refuses stays as it is.
        """
        found = [pair for pair in linear_weights(layers) if can_quantise(pair[1])]
        if head is not None and can_quantise(head):
            found.append((head, head))
        for weight, matrix in found:
            yield_point()
            if _storage(weight) not in self._int8:
                self._int8[_storage(weight)] = quantised(matrix)
        others = FrozenLinearKernels(self.choices)
        others._packed, others._int8, others._uses_int8 = self._packed, self._int8, True
        return others

    @property
    def int8_bytes(self) -> int:
        """Memory of the int8 weights in use."""
        return sum(weight.num_bytes for weight in self._int8.values()) if self._uses_int8 else 0

    def with_choices(self, choices: Choices) -> FrozenLinearKernels:
        """The same weights, prepacked ones too, with other choices; those under PREPACKED are left to these kernels."""
        others = FrozenLinearKernels(choices)
        others._packed, others._heads, others._family = self._packed, self._heads, self._family
        self._family.add(others)
        return others

    def choose(self, choices: Choices) -> None:
        """Use these choices from now on."""
        self.choices = choices
        self._found.clear()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside it the linear layers that this thread calls use these kernels.

        Inside kernels of the same weights with other choices those stay in use: a run's own, while it is scored.
        """
        before = active_kernels()
        _THREAD.kernels = self._in_use()
        try:
            yield
        finally:
            _THREAD.kernels = before

    def prepack(self, layers: nn.Module, head: Tensor | None, both_ways: bool = True) -> None:
        """Keep a copy of the weights of the linear layers, and of the head [V, D], in oneDNN's layout.

        Takes the memory of the weights once more, and twice with `both_ways`, which training needs. Leaves a weight as
        it is where a copy would not help: float32 ones are copied for the forward direction alone, and where the
        choices say that this is faster.
        """
        with on_huge_pages():
            self._prepack_layers(layers, both_ways)
            if head is None or not self._gains_by_copies(head, both_ways):
                return
            if both_ways:
                self._heads[_storage(head)] = [packed_weight(block) for block in head.split(HEAD_BLOCK)]
            elif not self._has_head(head):
                self._packed[_storage(head)] = packed_weight(head, both_ways=False)

    def _prepack_layers(self, layers: nn.Module, both_ways: bool) -> None:
        for kernels in self._family:
            kernels._found.clear()
        for weight, matrix in self._weights_to_copy(layers, both_ways):
            yield_point()
            found = self._packed.get(_storage(weight))
            if found is None or (both_ways and found.backward is None):
                self._packed[_storage(weight)] = packed_weight(matrix, both_ways, found)

    def _weights_to_copy(self, layers: nn.Module, both_ways: bool) -> list[tuple[Tensor, Tensor]]:
        """Each weight that gains by copies, as it is stored and as a matrix [O, I]."""
        return [pair for pair in linear_weights(layers) if self._gains_by_copies(pair[1], both_ways)]

    def _gains_by_copies(self, matrix: Tensor, both_ways: bool) -> bool:
        named = {
            direction: self.choices.get(product_name(matrix, direction)) for direction in (FORWARD, BACKWARD, PREPACKED)
        }
        if matrix.dtype is torch.float32:
            return not both_ways and bool(named[PREPACKED]) and can_prepack_float32(matrix)
        known = [way for ways in named.values() if ways is not None for way in ways.values()]
        return can_prepack(matrix) and (not known or not {"onednn", "prepacked"}.isdisjoint(known))

    def bytes_to_prepack(self, layers: nn.Module, head: Tensor | None, both_ways: bool = True) -> int:
        """Memory that `prepack` would take; 0 once it has been done."""
        weights = [weight for weight, _ in self._weights_to_copy(layers, both_ways)]
        kept = [self._packed.get(_storage(weight)) for weight in weights]
        missing = [(found is None) + (both_ways and (found is None or found.backward is None)) for found in kept]
        if head is not None and self._gains_by_copies(head, both_ways):
            is_kept = _storage(head) in self._heads if both_ways else self._has_head(head)
            weights, missing = [*weights, head], [*missing, 0 if is_kept else 1 + both_ways]
        return sum(
            count * weight.numel() * weight.element_size() for count, weight in zip(missing, weights, strict=True)
        )

    def _has_head(self, head: Tensor) -> bool:
        return _storage(head) in self._heads or _storage(head) in self._packed

    def head_blocks(self, head: Tensor) -> list[PackedWeight] | None:
        """The prepacked row blocks of a head that is not prepacked as a whole."""
        return None if _storage(head) in self._packed else self._blocks(head)

    def weight(self, weight: Tensor, is_transposed: bool = False) -> PackedWeight | None:
        """The packed weight [O, I] of a frozen weight, which is stored as [I, O] where `is_transposed`; None where
        torch's own product is as good."""
        if weight not in self._found:
            found = self._packed.get(_storage(weight)) or PackedWeight(weight.t() if is_transposed else weight)
            int8 = self._int8.get(_storage(weight)) if self._uses_int8 else None
            mine = replace(found, choices=self.choices, int8=int8)
            self._found[weight] = None if weight.dim() != 2 or mine.is_plain else mine
        return self._found[weight]

    def row_blocks(self, head: Tensor, size: int) -> list[PackedWeight]:
        """The head [V, D] in blocks of rows, about `size` each."""
        kept = self._blocks(head)
        return kept if kept is not None else [self._block(PackedWeight(block)) for block in head.split(size)]

    def _blocks(self, head: Tensor) -> list[PackedWeight] | None:
        kept = self._heads.get(_storage(head))
        return None if kept is None else [self._block(block) for block in kept]

    def _block(self, block: PackedWeight) -> PackedWeight:
        return replace(block, choices=self._in_use().choices, block_of=HEAD_BLOCK)

    def _in_use(self) -> FrozenLinearKernels:
        active = active_kernels()
        return active if active is not None and active in self._family else self


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


def can_prepack_float32(weight: Tensor) -> bool:
    """True for a float32 matrix on an x86 CPU, where oneDNN's products have the same bits with a copy and without."""
    here = weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.dim() == 2
    return here and _onednn_is_there() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def linear_weights(layers: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each weight of a linear layer, as it is stored and as a matrix [O, I].

    Of layers that multiply as torch's and transformers' own do; a subclass may compute something else.
    """
    return [
        (
            module.weight.detach(),
            module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().t(),
        )
        for module in layers.modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module) in (nn.Linear, Conv1D) and module.weight.dim() == 2
    ]


def _storage(weight: Tensor) -> Storage:
    return weight.data_ptr(), tuple(weight.shape), weight.stride()


@cache
def float32_takes_onednn() -> bool:
    """True on an x86 processor with AVX-512 that is not Intel's."""
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() != "AVX512" or not _onednn_is_there():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


@cache
def _onednn_is_there() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes_onednn(weight: Tensor) -> bool:
    is_plain = weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.dim() == 2
    return is_plain and weight.numel() >= WORTH_ONEDNN and float32_takes_onednn()


_MANY_ROWS = 256  # from here on, a product's rows are rounded up
_ROWS_AT_ONCE = 32  # to a multiple of this


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN compiles a kernel for every number of rows and keeps a thousand of them, which takes hundreds of megabytes
    where each step's packed rows have another number of tokens; so many rows are rounded up, with zeros."""
    num_rows = rows.numel() // rows.shape[-1]
    num_zeros = -num_rows % _ROWS_AT_ONCE if num_rows >= _MANY_ROWS else 0
    if not num_zeros:
        return _pointwise(rows, weight, bias)
    padded = torch.nn.functional.pad(rows.reshape(num_rows, -1), (0, 0, 0, num_zeros))
    return _pointwise(padded, weight, bias)[:num_rows].view(*rows.shape[:-1], -1)


def _pointwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out
