"""The output embeddings, with the scaling and capping of logits of some families (Gemma, Cohere, Granite), and with
what an encoder's masked-LM head has in front of them.

D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families.frozen_linear import FrozenLinearKernels


@dataclass(frozen=True)
class Head:
    """Hidden states to logits. `linear` None: the model runs whole, and its hidden states are its logits, or it has
    no logits (`refusal`)."""

    linear: nn.Module | None = None
    scale: float = 1.0
    cap: float | None = None  # logits become cap * tanh(logits / cap)
    kernels: FrozenLinearKernels = field(default_factory=FrozenLinearKernels)
    added: Tensor | None = None  # [V], to the logits (BART's `final_logits_bias`)
    features: Callable[[Tensor], Tensor] | None = None  # of the hidden states, which `linear` multiplies (an encoder)
    refusal: str | None = None  # of a base that has no output embeddings: what to say when its logits are wanted

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]. Raises BaseModelError where the base has none."""
        if self.refusal is not None:
            raise BaseModelError(self.refusal)
        if self.linear is None:
            return hidden
        with self.kernels.active():  # the head may lie on another device
            return self.bend(self._multiply(self._multiplied(hidden))).to(hidden.device)

    def _multiplied(self, hidden: Tensor) -> Tensor:
        """What the output embeddings multiply."""
        return hidden if self.features is None else self.features(hidden)

    def _multiply(self, hidden: Tensor) -> Tensor:
        weight = self.weight
        blocks = self.kernels.head_blocks(weight) if weight is not None and not torch.is_grad_enabled() else None
        if blocks is None:
            assert self.linear is not None
            whole: Tensor = self.linear(hidden)
            return whole
        return torch.cat([block.times(hidden) for block in blocks], dim=-1)

    def bend(self, products: Tensor) -> Tensor:
        """Logits of the plain products of hidden states and output embeddings."""
        logits = products * self.scale if self.scale != 1.0 else products
        logits = logits if self.added is None else logits + self.added
        return torch.tanh(logits / self.cap) * self.cap if self.cap is not None else logits

    def logits_of(self, hidden_ND: Tensor, ids_U: Tensor) -> Tensor:
        """Logits [N, U] of some ids alone, in float32 (float64 of a float64 base); gradients flow into the states.

        Raises BaseModelError where the base has no logits.
        """
        linear, wide = self.linear, torch.promote_types(hidden_ND.dtype, torch.float32)
        if type(linear) is not nn.Linear or hasattr(linear, "_hf_hook") or self.added is not None:
            whole: Tensor = self(hidden_ND)[:, ids_U]
            return whole.to(wide)
        weight, bias = linear.weight.detach()[ids_U].to(wide), linear.bias
        own_bias = None if bias is None else bias.detach()[ids_U].to(wide)
        with self.kernels.active():
            features = self._multiplied(hidden_ND).to(wide)
        return self.bend(nn.functional.linear(features, weight, own_bias))

    @property
    def weight(self) -> Tensor | None:
        """[V, D], where the head is one plain frozen matrix that may be used in blocks of rows."""
        linear = self.linear
        is_bare = getattr(linear, "bias", None) is None and self.features is None and self.added is None
        has_more = not is_bare or hasattr(linear, "_hf_hook")
        return linear.weight.detach() if type(linear) is nn.Linear and not has_more else None


def head_of(base: Base, kernels: FrozenLinearKernels) -> Head | None:
    """The head of a model whose backbone can run without it; None where it cannot."""
    linear = base.model.get_output_embeddings()
    if linear is None or base.model.base_model is base.model:
        return None
    config = base.model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None), kernels)
