"""Per-layer embeddings: what Gemma-3n and Gemma-4 look up of a token id for each layer, besides its input embedding.

They lie behind the input embedding, in one vector wider than H, so that whatever lays out rows handles one tensor. A
virtual token has no id; it gets the per-layer embeddings that the model itself gives to the vectors of an image or a
sound: those of id 0 in Gemma-3n, those of the pad in Gemma-4.

H width of the input embeddings, L layers, E width of a per-layer embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_KINDS = ("gemma3n_text", "gemma4_text")


@dataclass(frozen=True)
class PerLayerEmbeddings:
    """The second lookup of one model."""

    text_model: Any  # Any: transformers' text model, which has `get_per_layer_inputs`
    virtual_id: int  # whose embeddings a virtual token gets
    hidden_size: int  # H

    def behind(self, embeds: Tensor, ids: Tensor) -> Tensor:
        """[..., H + L * E] of input embeddings [..., H] and their token ids [...]."""
        with torch.no_grad():
            own: Tensor = self.text_model.get_per_layer_inputs(ids.to(embeds.device))
        return torch.cat([embeds, own.flatten(-2).to(embeds)], dim=-1)

    def behind_virtual(self, vectors: Tensor) -> Tensor:
        """[..., H + L * E] of vectors without token ids [..., H]; gradients flow into them."""
        ids = torch.full(vectors.shape[:-1], self.virtual_id, device=vectors.device)
        return self.behind(vectors, ids)

    def arguments(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the model's forward takes: input embeddings [..., H] and per-layer inputs [..., L, E]."""
        embeds, own = inputs.split([self.hidden_size, inputs.shape[-1] - self.hidden_size], dim=-1)
        num_layers = self.text_model.config.num_hidden_layers
        return {"inputs_embeds": embeds, "per_layer_inputs": own.unflatten(-1, (num_layers, -1))}


def per_layer_embeddings(model: PreTrainedModel) -> PerLayerEmbeddings | None:
    """Those of a model; None where it has none."""
    text = model.config.get_text_config(decoder=True)
    if text.model_type not in _KINDS or not text.hidden_size_per_layer_input:
        return None
    text_model = next(module for module in model.modules() if hasattr(module, "get_per_layer_inputs"))
    virtual_id = 0 if text.model_type == "gemma3n_text" else text.pad_token_id or 0
    return PerLayerEmbeddings(text_model, virtual_id, text.hidden_size)
