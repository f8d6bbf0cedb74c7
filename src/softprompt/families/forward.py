"""One frozen model as two functions: embeddings to hidden states, hidden states to logits.

The split lets the loss compute logits only where a target is. `softprompt.families.exactness` finds the `Forward` of a
base when it is first used.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn
from transformers import DynamicCache

from softprompt.base import PerLayerEmbeddings
from softprompt.families.batch import AttentionBatch, BatchCache, BatchMask, Carrier
from softprompt.families.frozen_linear import Choices
from softprompt.families.head import Head

_CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")  # Mamba's and RWKV's have names of their own

# all: keys and values of every position, whatever the masks leave out; own: what the model makes for itself (states,
# windows), for rows that run alone; none: a row runs whole for every token
CacheKind = Literal["all", "own", "none"]


@dataclass(frozen=True)
class Packing:
    """How a base runs packed rows, or why it does not."""

    carrier: Carrier | None
    note: str


@dataclass
class ModelCache:
    """What a model keeps of one row, and the argument that brings it; None until the model has made its own."""

    value: Any  # Any: a transformers Cache, or what a family has in its stead
    argument: str

    def as_argument(self) -> dict[str, Any]:
        return {} if self.value is None else {self.argument: self.value}

    def keep(self, output: Any) -> None:
        """Keep the cache that a forward returned, if it returned one."""
        found = getattr(output, self.argument, None)
        self.value = self.value if found is None else found

    def bytes_of_keys_and_values(self) -> int:
        """Bytes that grow with the row."""
        layers = getattr(self.value, "layers", None) or ()
        return sum(_num_bytes(getattr(layer, name, None)) for layer in layers for name in ("keys", "values"))

    def num_bytes(self) -> int:
        """Bytes of all tensors in it."""
        return _num_bytes(self.value)


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return _num_bytes(vars(value)) if type(value).__module__.startswith("transformers") else 0


@dataclass(frozen=True)
class Forward:
    """How one base runs. B batch, S slots (pads included), H embedding width, D hidden width, V vocabulary."""

    backbone: nn.Module
    head: Head
    first_position: int | None  # what the family counts from; None: it derives positions by itself (ALiBi, BART)
    packing: Packing = Packing(None, "rows run padded by length")
    max_batchable_length: int | None = None  # a longer row would change the others of its batch, and runs alone
    cache: CacheKind = "all"
    supports_chunked_prefill: bool = True  # False: a text runs whole, and only single tokens run over its cache
    per_layer: PerLayerEmbeddings | None = None  # of the embeddings that a forward takes, behind them
    is_causal: bool = True  # False: every token of a row sees every other one, and the soft prompt sees the text

    @property
    def can_pack(self) -> bool:
        """Whether the base runs packed rows, without padding."""
        return self.packing.carrier is not None

    @property
    def can_share_prefix(self) -> bool:
        """Whether it runs a soft prompt once for many packed rows: what the prompt computes must not see the text."""
        return self.can_pack and self.is_causal

    def new_cache(self) -> ModelCache | None:
        """An empty cache for one row; None for a base that has none, which runs a row whole for every token."""
        if self.cache == "none":
            return None
        return ModelCache(DynamicCache() if self.cache == "all" else None, self._cache_argument)

    def hidden_states(
        self,
        embeds_BSH: Tensor,
        mask_BM: Tensor,
        positions_BS: Tensor,
        cache: ModelCache | None = None,
        token_types_BS: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [B, S, D], after the final norm. `mask_BM` also covers what is in the cache.

        Token types, which are an encoder's, are 0 where none are given.
        """
        if cache is None:
            without: dict[str, Any] = {"use_cache": False} if self.is_causal else _types(token_types_BS)
            return _hidden(self._run(embeds_BSH, positions_BS, attention_mask=mask_BM, **without), embeds_BSH)
        seen = {"attention_mask": mask_BM} if self.cache == "all" else {}  # states are not masked
        output = self._run(embeds_BSH, positions_BS, use_cache=True, **seen, **cache.as_argument())
        cache.keep(output)
        return _hidden(output, embeds_BSH)

    def packed_hidden_states(
        self, embeds_SH: Tensor, positions_S: Tensor, batch: AttentionBatch, token_types_S: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [S, D] of a packed or cached batch; only for a base whose `packing` has a carrier."""
        assert self.packing.carrier is not None, self.packing.note
        brought: dict[str, Any] = {"past_key_values": BatchCache(batch)}
        if self.packing.carrier == "mask":
            brought = {"attention_mask": BatchMask.of(batch, embeds_SH)}
        brought |= (
            {"use_cache": False} if self.is_causal else _types(None if token_types_S is None else token_types_S[None])
        )
        return _hidden(self._run(embeds_SH[None], positions_S[None], **brought), embeds_SH)[0]

    def arguments(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the model's forward takes for `Base.token_inputs` and `Base.virtual_inputs`."""
        return {"inputs_embeds": inputs} if self.per_layer is None else self.per_layer.arguments(inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.head(hidden)

    def with_choices(self, choices: Choices) -> Forward:
        """The same base, its products by other choices; itself where they are the same."""
        kernels = self.head.kernels
        if choices == kernels.choices:
            return self
        return replace(self, head=replace(self.head, kernels=kernels.with_choices(choices)))

    def bytes_to_prepack(self, both_ways: bool = True) -> int:
        """Memory that `prepack` would take; 0 where it would not help, or has been done."""
        return self.head.kernels.bytes_to_prepack(self.backbone, self.head.weight, both_ways)

    def prepack(self, both_ways: bool = True) -> None:
        """Keep a second copy of the weights in the layout that this processor multiplies fastest.

        `both_ways`: for training, which also multiplies by their transposes.
        """
        self.head.kernels.prepack(self.backbone, self.head.weight, both_ways)

    def with_int8(self) -> Forward:
        """This forward, but that steps of few rows read the weights in int8 (`FrozenLinearKernels.with_int8`)."""
        kernels = self.head.kernels.with_int8(self.backbone, self.head.weight)
        return replace(self, head=replace(self.head, kernels=kernels))

    @property
    def int8_bytes(self) -> int:
        """Memory of the int8 weights; 0 for a forward without."""
        return self.head.kernels.int8_bytes

    def _run(self, embeds: Tensor, positions: Tensor, **arguments: Any) -> Any:  # Any: transformers' output classes
        if self.first_position is not None:
            arguments["position_ids"] = positions + self.first_position if self.first_position else positions
        with self.head.kernels.active():
            return self.backbone(**self.arguments(embeds), **arguments)

    @cached_property
    def _cache_argument(self) -> str:
        known = inspect.signature(self.backbone.forward).parameters
        return next((name for name in _CACHE_ARGUMENTS if name in known), _CACHE_ARGUMENTS[0])


def _types(token_types_BS: Tensor | None) -> dict[str, Tensor]:
    return {} if token_types_BS is None else {"token_type_ids": token_types_BS}


def _hidden(output: Any, embeds: Tensor) -> Tensor:  # Any: transformers' output classes
    hidden: Tensor = output[0]
    return hidden.to(embeds.device)  # where the layers are spread over devices, from the last one's
