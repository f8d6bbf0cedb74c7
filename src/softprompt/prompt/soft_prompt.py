"""The soft prompt as a value: a tensor [P, H], the head trained beside it, and where it came from. Frozen once made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from softprompt.errors import PromptError
from softprompt.types import PromptRecord


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """P vectors of the base's input-embedding space, float32 on the CPU, put before the tokens of every input.

    With a prompt for the decoder of an encoder-decoder (`record.form.has_decoder_prompt`) the tensor is [2P, H], as in
    PEFT: first the encoder's vectors, then the decoder's.

    Raises PromptError where the tensor is not two-dimensional, not floating, empty, or holds NaN or infinity.
    """

    tensor: Tensor  # [P, H]
    record: PromptRecord = field(default_factory=PromptRecord)
    head: Mapping[str, Tensor] = field(default_factory=dict)  # weights by transformers' names: "classifier.weight"

    def __post_init__(self) -> None:
        _check(self.tensor)
        object.__setattr__(self, "tensor", _kept(self.tensor))
        for name, weight in self.head.items():
            _check_finite(weight, f"the head's {name}")
        object.__setattr__(self, "head", {name: _kept(self.head[name]) for name in sorted(self.head)})
        if self.record.form.has_decoder_prompt and len(self.tensor) % 2:
            raise PromptError(f"a prompt for encoder and decoder has 2 x P vectors; this one has {len(self.tensor)}")

    def __repr__(self) -> str:
        base = f", base {self.record.base_name!r}" if self.record.base_name is not None else ""
        size = f"{self.num_virtual_tokens} virtual tokens x {self.hidden_size}"
        return f"SoftPrompt({size}, {self.record.form.kind}{base}, hash {self.content_hash[:8]})"

    @property
    def num_virtual_tokens(self) -> int:
        """P, in front of the text. With a prompt for the decoder there are as many in front of its tokens."""
        return self.tensor.shape[0] // 2 if self.record.form.has_decoder_prompt else self.tensor.shape[0]

    @property
    def num_decoder_tokens(self) -> int:
        """Virtual tokens in front of the decoder's tokens."""
        return self.tensor.shape[0] - self.num_virtual_tokens

    @property
    def num_parameters(self) -> int:
        """All trained numbers, the head's among them."""
        return self.tensor.numel() + sum(weight.numel() for weight in self.head.values())

    @property
    def hidden_size(self) -> int:
        return self.tensor.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.tensor.element_size()

    @cached_property
    def content_hash(self) -> str:
        """sha256 over shape and float32 values: the same vectors have the same hash, whatever their record.

        The head's weights count too, where there is one.
        """
        digest = hashlib.sha256(repr(tuple(self.tensor.shape)).encode())
        digest.update(self.tensor.numpy().tobytes())
        for name, weight in self.head.items():
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()


def _check(tensor: Tensor) -> None:
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise PromptError(
            f"a soft prompt has the shape [virtual tokens, hidden size]; this one has {list(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise PromptError(f"a soft prompt holds floating-point numbers; this one has dtype {tensor.dtype}")
    _check_finite(tensor, "a soft prompt")


def _check_finite(tensor: Tensor, what: str) -> None:
    num_bad = int((~torch.isfinite(tensor)).sum())
    if num_bad:
        raise PromptError(f"{what} holds finite numbers; {num_bad} of {tensor.numel()} are NaN or infinite")


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
