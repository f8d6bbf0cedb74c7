"""Products of few rows with a frozen weight by this package's own C (`thin_linear.c`), weights stored in int8, and
RMSNorm of few rows (`rms_norm.c`).

A step of generation multiplies one row per running sequence, so it takes as long as reading the weights does; what
torch ships reads a weight of two to 32 rows at a half to a quarter of the memory's rate (figures in
`docs/performance.md`). The C reads each weight once. Its sums are float32 in one order, so a row gives the same bits
alone and beside others, and an int8 weight gives those of its dequantised float32 weight.

T rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from softprompt.families.native import native_function, native_library

MAX_ROWS = 64  # with more of them the blocks of a library are as fast
GROUP = 32  # inputs of an int8 weight that share a scale, as in llama.cpp's Q8_0
_STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as in thin_linear.c
_DTYPES = (torch.float32, torch.bfloat16)  # of rows, and of weights as they are loaded
_GENERATIONS = {"AVX512": 2, "AVX2": 1}  # torch's names of what the processor has


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight [O, I] in 8 bits per number and 16 per group of 32."""

    numbers: Tensor  # [O, I] int8, -127 to 127
    scales: Tensor  # [O, I / 32] bfloat16

    @property
    def num_bytes(self) -> int:
        return self.numbers.numel() + 2 * self.scales.numel()

    def dequantised(self) -> Tensor:
        """[O, I] float32: what the products compute with."""
        groups: Tensor = self.numbers.unflatten(1, (-1, GROUP)).float() * self.scales.float()[..., None]
        return groups.flatten(1)

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., O] of rows [..., I], as `thin_linear`."""
        return thin_linear(rows, self.numbers, bias, self.scales)


def can_quantise(weight: Tensor) -> bool:
    """Whether `thin_linear` multiplies by the weight in int8: a matrix on the CPU whose rows are whole groups."""
    is_matrix = weight.dim() == 2 and weight.dtype in _DTYPES and weight.device.type == "cpu"
    return is_matrix and weight.shape[1] % GROUP == 0 and native_library() is not None


def quantised(weight: Tensor) -> Int8Weight:
    """The weight [O, I], each group rounded to multiples of its largest number's 127th part, which is a bfloat16.

    The error of a number is at most half a multiple. Round-to-nearest with a scale per group is that of ZeroQuant
    (Yao et al. 2022, 2206.01861) and of llama.cpp's Q8_0.
    """
    blocks = [_quantised_rows(block) for block in weight.split(4_096)]  # the float32 copies stay small
    return Int8Weight(torch.cat([numbers for numbers, _ in blocks]), torch.cat([scales for _, scales in blocks]))


def _quantised_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, GROUP))
    exact = groups.abs().amax(dim=-1) / 127
    scales = exact.to(torch.bfloat16)
    scales = torch.where(scales.float() < exact, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    numbers = torch.where(scales[..., None] > 0, groups / scales.float()[..., None], 0.0)
    return numbers.round().clamp(-127, 127).to(torch.int8).flatten(1), scales


def has_thin_linear(weight: Tensor) -> bool:
    """Whether `thin_linear` multiplies by a weight as it lies: dense float32 or bfloat16 on the CPU."""
    is_dense = weight.dim() == 2 and weight.is_contiguous() and weight.device.type == "cpu"
    return is_dense and weight.dtype in _DTYPES and native_library() is not None


def thin_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """[..., O] of rows [..., I], float32 or bfloat16; sums and bias are added in float32. No gradient.

    `weight` [O, I] is dense, float32 or bfloat16, or int8 with `scales`. Raises MemoryError where there is no memory
    for a few rows of the weight in float32.
    """
    rows = rows.contiguous()  # nothing, of rows that are
    num_outputs, num_inputs = weight.shape
    out = rows.new_empty(*rows.shape[:-1], num_outputs)
    failed = native_function("softprompt_thin_linear", "nnnnnnppppp")(
        rows.numel() // num_inputs, num_inputs, num_outputs,
        _STORAGES[weight.dtype], rows.dtype is torch.bfloat16, _generation(), rows.data_ptr(), weight.data_ptr(),
        None if scales is None else scales.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the panels of a product")
    return out


@cache
def _generation() -> int:
    return _GENERATIONS.get(torch.backends.cpu.get_cpu_capability(), 0)


def can_normalise(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` computes rows [..., D]: few ones, dense float32 on the CPU."""
    return (
        hidden.dtype is torch.float32
        and weight.dtype is torch.float32
        and hidden.device.type == "cpu"
        and 0 < hidden.numel() <= MAX_ROWS * hidden.shape[-1]
        and hidden.is_contiguous()
        and native_library() is not None
    )


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, 1910.07467) of rows [..., D] by `rms_norm.c`. No gradient."""
    out = torch.empty_like(hidden)
    width = hidden.shape[-1]
    normalise = native_function("softprompt_rms_norm", "nnfppp")
    normalise(hidden.numel() // width, width, epsilon, hidden.data_ptr(), weight.data_ptr(), out.data_ptr())
    return out
