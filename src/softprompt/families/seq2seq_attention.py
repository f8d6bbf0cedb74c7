"""The attention and the position tables of encoder-decoders, for our batches: T5's kin and BART's.

Each function is a family's own method with our batches besides (`softprompt.families.patches` puts it on the module);
given anything else, it calls the class's method. Cross-attention multiplies keys and values of the encoder's states
that come with a forward, which may be none: those of earlier ones are cached.

S tokens of a forward, D hidden width, h heads, d width of a head, M most keys of any token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.families.attention import attend
from softprompt.families.batch import AttentionBatch, BatchMask, CrossBatch, Scoring, once
from softprompt.families.token_positions import given_positions


def _t5(
    module: Any,
    hidden_states: Tensor,
    mask: Any = None,
    key_value_states: Tensor | None = None,
    position_bias: Any = None,
    **kwargs: Any,
) -> Any:
    if not isinstance(mask, BatchMask):
        return type(module).forward(
            module, hidden_states, mask, key_value_states=key_value_states, position_bias=position_bias, **kwargs
        )
    bias = _relative_bias(module, mask.batch) if position_bias is None else position_bias
    scoring = Scoring(scale=1.0, relative_bias=bias)
    return _attended(module, hidden_states, key_value_states, mask.batch, "q k v o", scoring), bias, None


def _umt5(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    if not isinstance(attention_mask, BatchMask):
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        return type(module).forward(module, hidden_states, **given, **kwargs)
    scoring = Scoring(scale=1.0, relative_bias=_relative_bias(module, attention_mask.batch))
    return _attended(module, hidden_states, encoder_hidden_states, attention_mask.batch, "q k v o", scoring), None


def _bart(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    if not isinstance(attention_mask, BatchMask):
        given = {"key_value_states": key_value_states, "attention_mask": attention_mask}
        return type(module).forward(module, hidden_states, **given, **kwargs)
    scoring, names = Scoring(scale=float(module.scaling)), "q_proj k_proj v_proj out_proj"
    return _attended(module, hidden_states, key_value_states, attention_mask.batch, names, scoring), None


def _attended(
    module: Any, hidden: Tensor, states: Tensor | None, batch: AttentionBatch, names: str, scoring: Scoring
) -> Tensor:
    """Attention of hidden states [1, S, D] to themselves or to an encoder's states [1, E, D], which may be none."""
    to_query, to_key, to_value, to_out = (getattr(module, name) for name in names.split())
    num_heads = module.n_heads if hasattr(module, "n_heads") else module.num_heads
    sources = hidden if states is None else states
    query = _per_head(to_query, hidden, num_heads)
    key, value = (_per_head(linear, sources, num_heads) for linear in (to_key, to_value))
    found: Tensor = to_out(attend(batch, module, query, key, value, scoring).flatten(1)[None])
    return found


def _per_head(linear: nn.Linear, tokens: Tensor, num_heads: int) -> Tensor:
    """[h, S, d] of tokens [1, S, D]."""
    rows = linear(tokens[0]) if tokens.shape[1] else tokens.new_zeros(0, linear.out_features)
    return rows.view(len(rows), num_heads, linear.out_features // num_heads).transpose(0, 1)


def _relative_bias(module: Any, batch: AttentionBatch) -> Tensor | None:
    """[h, 2M - 1] by the distance of a key from a query, for the most keys M of any token; None for cross-attention."""
    if not module.has_relative_attention_bias or isinstance(batch, CrossBatch):
        return None
    most = batch.max_keys

    def make() -> Tensor:
        bias: Tensor = module.compute_bias(1, 2 * most - 1, past_seen_tokens=most - 1)[0, :, 0]
        return bias

    return once(batch, ("relative bias", module), make)


def position_table(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Position embeddings [1, S, D] of the positions that are given, else those that the module counts."""
    positions_S = given_positions()
    if positions_S is None:
        counted: Tensor = type(module).forward(module, *args, **kwargs)
        return counted
    if not isinstance(module, nn.Embedding):  # M2M100's sinusoids, which begin behind the pad's
        return torch.nn.functional.embedding(positions_S[None] + module.padding_idx + 1, module.weights)
    found: Tensor = nn.Embedding.forward(module, positions_S[None] + getattr(module, "offset", 0))
    return found


SEQ2SEQ_ATTENTION: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("T5Attention", "MT5Attention"), _t5),
    "UMT5Attention": _umt5,
    **{
        f"{family}Attention": _bart
        for family in ("Bart", "MBart", "Pegasus", "Marian", "PLBart", "Blenderbot", "BlenderbotSmall", "M2M100")
    },
}
POSITION_TABLES = (
    *(f"{family}LearnedPositionalEmbedding" for family in ("Bart", "MBart", "PLBart", "Blenderbot", "BlenderbotSmall")),
    *(f"{family}SinusoidalPositionalEmbedding" for family in ("Pegasus", "Marian", "M2M100")),
)
