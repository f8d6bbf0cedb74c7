"""The soft prompt as a value: a tensor [P, H] and where it came from. Frozen once made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from softprompt.errors import PromptError
from softprompt.types import PromptRecord


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """P vectors of the base's input-embedding space, float32 on the CPU, put before the tokens of every input.

    Raises PromptError where the tensor is not two-dimensional, not floating, empty, or holds NaN or infinity.
    """

    tensor: Tensor  # [P, H]
    record: PromptRecord = field(default_factory=PromptRecord)

    def __post_init__(self) -> None:
        _check(self.tensor)
        value = self.tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        object.__setattr__(self, "tensor", value)

    def __repr__(self) -> str:
        base = f", base {self.record.base_name!r}" if self.record.base_name is not None else ""
        size = f"{self.num_virtual_tokens} virtual tokens x {self.hidden_size}"
        return f"SoftPrompt({size}, {self.record.form.kind}{base}, hash {self.content_hash[:8]})"

    @property
    def num_virtual_tokens(self) -> int:
        return self.tensor.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.tensor.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @cached_property
    def content_hash(self) -> str:
        """sha256 over shape and float32 values: the same vectors have the same hash, whatever their record."""
        digest = hashlib.sha256(repr(tuple(self.tensor.shape)).encode())
        digest.update(self.tensor.numpy().tobytes())
        return digest.hexdigest()


def _check(tensor: Tensor) -> None:
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise PromptError(
            f"a soft prompt has the shape [virtual tokens, hidden size]; this one has {list(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise PromptError(f"a soft prompt holds floating-point numbers; this one has dtype {tensor.dtype}")
    num_bad = int((~torch.isfinite(tensor)).sum())
    if num_bad:
        raise PromptError(f"a soft prompt holds finite numbers; {num_bad} of {tensor.numel()} are NaN or infinite")
