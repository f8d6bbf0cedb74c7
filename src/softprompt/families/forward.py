"""One frozen model as two functions: embeddings to hidden states, hidden states to logits.

The split lets the loss compute logits only where a target is. It is checked against the model's own forward when it is
made; a model for which it does not hold runs whole (its hidden states are its logits). So are packed rows: a base that
does not give them the answers of rows run one by one runs padded rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families import activation, products
from softprompt.families.head import Head, head_of
from softprompt.families.known import KNOWN_FAMILIES
from softprompt.families.own_attention import PackedCache
from softprompt.families.packed import CarriedRows, Carrier, PackedMask, PackedRows
from softprompt.families.packing import Packing, find_packing
from softprompt.families.products import Products
from softprompt.families.rotation import length_of_fixed_rotation

_PROBE_IDS = (3, 1, 4, 1, 5)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; 16-bit dtypes take the default below
_TOLERANCE_16_BIT = 0.1
_TOLERANCE_FLOAT32_INSIDE = 1e-5  # some families compute their softmax in float32, even in a float64 base
_UNKNOWN = Packing(None, "rows run padded by length")


@dataclass(frozen=True)
class Forward:
    """How one base runs. B batch, S slots (pads included), H embedding width, D hidden width, V vocabulary."""

    backbone: nn.Module
    head: Head
    takes_positions: bool  # False: the family derives positions from the mask (ALiBi)
    packing: Packing = _UNKNOWN
    alone_beyond: int | None = None  # a longer row changes its company's positions, and runs by itself

    def hidden_states(
        self, embeds_BSH: Tensor, mask_BM: Tensor, positions_BS: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Last hidden states [B, S, D], after the final norm. `mask_BM` also covers what lies in the cache."""
        kept = {"past_key_values": cache} if cache is not None else {}
        return self._run(embeds_BSH, positions_BS, attention_mask=mask_BM, use_cache=cache is not None, **kept)

    def packed_hidden_states(self, embeds_SH: Tensor, positions_S: Tensor, rows: CarriedRows) -> Tensor:
        """Last hidden states [S, D] of packed or held rows; only for a base whose `packing` has a carrier."""
        assert self.packing.carrier is not None, self.packing.note
        return self._packed(self.packing.carrier, embeds_SH[None], positions_S[None], rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.head(hidden)

    def bytes_to_arrange(self, both_ways: bool = True) -> int:
        """Memory that `arrange` would take; 0 where it would not help, or has been done."""
        return self.head.products.bytes_to_arrange(self.backbone, self.head.weight, both_ways)

    def arrange(self, both_ways: bool = True) -> None:
        """Keep the weights as this processor multiplies them fastest, besides the weights themselves.

        `both_ways`: for training, which also multiplies by their transposes.
        """
        products = self.head.products
        (products.arrange if both_ways else products.arrange_forward)(self.backbone, self.head.weight)

    def _packed(self, carrier: Carrier, embeds_1SH: Tensor, positions_1S: Tensor, rows: CarriedRows) -> Tensor:
        brought: dict[str, Any] = {"past_key_values": PackedCache(rows)}
        if carrier == "mask":
            brought = {"attention_mask": PackedMask.of(rows, embeds_1SH)}
        return self._run(embeds_1SH, positions_1S, use_cache=False, **brought)[0]

    def _run(self, embeds: Tensor, positions: Tensor, **arguments: Any) -> Tensor:
        if self.takes_positions:
            arguments["position_ids"] = positions
        with self.head.products.active():
            hidden: Tensor = self.backbone(inputs_embeds=embeds, **arguments)[0]
        return hidden.to(embeds.device)  # where the layers are spread over devices, from the last one's


_FORWARDS: WeakKeyDictionary[Base, Forward] = WeakKeyDictionary()


def forward_of(base: Base) -> Forward:
    """The forward of a base: backbone and head apart where that equals the model's own, else the whole model.

    A family that is not on the tested list is also checked for causality and for rows that ignore their padding.
    Raises BaseModelError where it fails.
    """
    if base not in _FORWARDS:
        _FORWARDS[base] = _found(base)
    return _FORWARDS[base]


def new_cache() -> DynamicCache:
    """An empty key-value cache for one batch. It keeps every position: sliding windows are the masks' business, so
    that padded rows stay exact."""
    return DynamicCache()


@torch.no_grad()
def _found(base: Base) -> Forward:
    model = base.model
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    own_products = Products()
    activation.install(model)
    products.install(model)
    whole = Forward(model, Head(products=own_products), takes_positions)
    head = head_of(base, own_products)
    split = Forward(model.base_model, head, takes_positions) if head is not None else None
    chosen = split if split is not None and _same_logits(base, split, whole) else whole
    if model.config.model_type not in KNOWN_FAMILIES:
        _check_unknown(base, chosen)
    return replace(chosen, packing=_packing(base, chosen), alone_beyond=length_of_fixed_rotation(model))


def _packing(base: Base, forward: Forward) -> Packing:
    def is_close(ours: Tensor, reference: Tensor) -> bool:
        return _close(ours, reference, {torch.float64: _TOLERANCE_FLOAT32_INSIDE})

    def run_packed(carrier: Carrier, embeds: Tensor, positions: Tensor, rows: PackedRows) -> Tensor:
        return forward.logits(forward._packed(carrier, embeds, positions, rows))

    def run_plain(embeds: Tensor) -> Tensor:
        positions = torch.arange(embeds.shape[1], device=base.device)[None]
        return forward.logits(forward.hidden_states(embeds, torch.ones_like(positions), positions))[0]

    return find_packing(base, run_packed, run_plain, is_close)


def _probe(base: Base, ids: tuple[int, ...] = _PROBE_IDS, pads: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    embeds = base.embed(torch.tensor([[i % base.vocab_size for i in ids]]))
    nothing = embeds.new_zeros(1, pads, embeds.shape[-1])
    mask = torch.tensor([[0] * pads + [1] * len(ids)], device=base.device)
    positions = torch.tensor([[0] * pads + list(range(len(ids)))], device=base.device)
    return torch.cat([nothing, embeds], dim=1), mask, positions


def _same_logits(base: Base, split: Forward, whole: Forward) -> bool:
    inputs = _probe(base)
    return _close(split.logits(split.hidden_states(*inputs)), whole.hidden_states(*inputs))


def _check_unknown(base: Base, forward: Forward) -> None:
    def logits(ids: tuple[int, ...], pads: int = 0) -> Tensor:
        return forward.logits(forward.hidden_states(*_probe(base, ids, pads)))[:, pads:]

    kind = base.model.config.model_type
    if not _close(logits((*_PROBE_IDS[:-1], 2))[:, :-1], logits(_PROBE_IDS)[:, :-1]):
        raise BaseModelError(f"base {base.name!r} ({kind}) is not causal: a later token changes earlier answers")
    if not _close(logits(_PROBE_IDS, pads=3), logits(_PROBE_IDS)):
        raise BaseModelError(f"base {base.name!r} ({kind}) answers differently under padding; it is not supported yet")


def _close(ours: Tensor, reference: Tensor, tolerances: Mapping[torch.dtype, float] = _TOLERANCE) -> bool:
    if ours.shape != reference.shape:
        return False
    tolerance = {**_TOLERANCE, **tolerances}.get(reference.dtype, _TOLERANCE_16_BIT)
    return bool((ours - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1e-3))
