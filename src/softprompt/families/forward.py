"""One frozen model as two functions: embeddings to hidden states, hidden states to logits.

The split lets the loss compute logits only where a target is. It is checked against the model's own forward when it is
made; a model for which it does not hold runs whole (its hidden states are its logits).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families.known import KNOWN_FAMILIES

_PROBE_IDS = (3, 1, 4, 1, 5)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; 16-bit dtypes take the default below
_TOLERANCE_16_BIT = 0.1


@dataclass(frozen=True)
class Forward:
    """How one base runs. B batch, S slots (pads included), H embedding width, D hidden width, V vocabulary."""

    backbone: Callable[..., Any]  # Any: transformers' model outputs
    head: Callable[[Tensor], Tensor]  # [..., D] -> [..., V]
    takes_positions: bool  # False: the family derives positions from the mask (ALiBi)

    def hidden_states(
        self, embeds_BSH: Tensor, mask_BM: Tensor, positions_BS: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Last hidden states [B, S, D], after the final norm. `mask_BM` also covers what lies in the cache."""
        positions = {"position_ids": positions_BS} if self.takes_positions else {}
        kept = {"past_key_values": cache} if cache is not None else {}
        output = self.backbone(
            inputs_embeds=embeds_BSH, attention_mask=mask_BM, use_cache=cache is not None, **positions, **kept
        )
        hidden: Tensor = output[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.head(hidden)


def forward_of(base: Base) -> Forward:
    """The forward of a base: backbone and head apart where that equals the model's own, else the whole model.

    A family that is not on the tested list is also checked for causality and for rows that ignore their padding.
    Raises BaseModelError where it fails.
    """
    model = base.model
    head = _head(base)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    split = Forward(model.base_model, head, takes_positions) if head is not None else None
    chosen = split if split is not None and _equals_model(base, split) else Forward(model, _same, takes_positions)
    if model.config.model_type not in KNOWN_FAMILIES:
        _check_unknown(base, chosen)
    return chosen


def new_cache() -> DynamicCache:
    """An empty key-value cache for one batch. It keeps every position: sliding windows are the masks' business, so
    that padded rows stay exact."""
    return DynamicCache()


def _same(logits: Tensor) -> Tensor:
    return logits


def _head(base: Base) -> Callable[[Tensor], Tensor] | None:
    """The output embeddings with what some families do to the logits behind them (Gemma, Cohere, Granite)."""
    linear = base.model.get_output_embeddings()
    if linear is None or base.model.base_model is base.model:
        return None
    config = base.model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden)
        logits = logits * scale if scale != 1.0 else logits
        return torch.tanh(logits / cap) * cap if cap is not None else logits

    return head


def _probe(base: Base, ids: tuple[int, ...] = _PROBE_IDS, pads: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    embeds = base.embed(torch.tensor([[i % base.vocab_size for i in ids]]))
    nothing = embeds.new_zeros(1, pads, embeds.shape[-1])
    mask = torch.tensor([[0] * pads + [1] * len(ids)], device=base.device)
    positions = torch.tensor([[0] * pads + list(range(len(ids)))], device=base.device)
    return torch.cat([nothing, embeds], dim=1), mask, positions


@torch.no_grad()
def _equals_model(base: Base, split: Forward) -> bool:
    inputs = _probe(base)
    whole = Forward(base.model, _same, split.takes_positions)
    return _close(split.logits(split.hidden_states(*inputs)), whole.hidden_states(*inputs))


@torch.no_grad()
def _check_unknown(base: Base, forward: Forward) -> None:
    def logits(ids: tuple[int, ...], pads: int = 0) -> Tensor:
        return forward.logits(forward.hidden_states(*_probe(base, ids, pads)))[:, pads:]

    kind = base.model.config.model_type
    if not _close(logits((*_PROBE_IDS[:-1], 2))[:, :-1], logits(_PROBE_IDS)[:, :-1]):
        raise BaseModelError(f"base {base.name!r} ({kind}) is not causal: a later token changes earlier answers")
    if not _close(logits(_PROBE_IDS, pads=3), logits(_PROBE_IDS)):
        raise BaseModelError(f"base {base.name!r} ({kind}) answers differently under padding; it is not supported yet")


def _close(ours: Tensor, reference: Tensor) -> bool:
    if ours.shape != reference.shape:
        return False
    tolerance = _TOLERANCE.get(reference.dtype, _TOLERANCE_16_BIT)
    return bool((ours - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1e-3))
