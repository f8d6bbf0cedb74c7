"""Packed attention for the families whose attention is written out in their modules.

One small function per family, installed once per module: with packed rows it takes the place of the scores and the
softmax, between the module's own projections; without them it calls the module's own method, bit-equal. The rows come
as the attention mask where the module is given it as it is (GPT-J, GPT-Neo, CodeGen), else as the cache argument, which
every module is given.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb as falcon_rotary
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi

from softprompt.families.attend import attend
from softprompt.families.packed import CarriedRows, Carrier, PackedMask
from softprompt.families.scores import Scores

Method = Callable[..., Any]  # a module's method, with the module as its first argument


class PackedCache(DynamicCache):
    """An empty cache that carries rows to the attention modules; nothing is stored in it."""

    def __init__(self, rows: CarriedRows) -> None:
        super().__init__()
        self.rows = rows

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """A module that fills it does not know packed rows, and would give wrong answers."""
        raise NotImplementedError("this attention does not know packed rows")

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """One key, none before it: the model's own causal mask, which nobody reads, stays small."""
        return 1, 0


def install(model: PreTrainedModel) -> Carrier | None:
    """Put our function before each attention module's own; None where the family has none here."""
    carrier: Carrier | None = None
    for module in model.modules():
        name, method = _METHODS.get(type(module).__name__, (None, None))
        if name is not None and method is not None:
            carrier = "cache" if name == "forward" else "mask"
            vars(module).setdefault(name, MethodType(method, module))
    return carrier


def remove(model: PreTrainedModel) -> None:
    """Leave each module with its own method."""
    for module in model.modules():
        name, _ = _METHODS.get(type(module).__name__, ("", None))
        vars(module).pop(name, None)


def _bloom(module: Any, hidden: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    cache = kwargs.get("layer_past")
    if not isinstance(cache, PackedCache):
        return type(module).forward(module, hidden, residual, alibi, attention_mask, **kwargs)
    query, key, value = (part[0] for part in module._reshape(module.query_key_value(hidden)))
    bias = cache.rows.once("alibi", lambda: _bloom_alibi(module, cache.rows, hidden))
    scores = Scores(scale=module.inv_norm_factor, position_bias=bias)
    mixed = attend(cache.rows, module, query, key, value, scores)
    return residual + module.dense(mixed.flatten(1)[None]), None


def _bloom_alibi(module: Any, rows: CarriedRows, like: Tensor) -> Tensor:
    """[h, M] float32, whatever the base's dtype."""
    ones = torch.ones(1, rows.longest, dtype=torch.long, device=like.device)
    bias: Tensor = bloom_alibi(ones, module.num_heads, torch.float32)[:, 0]
    return bias


def _mpt(module: Any, hidden: Tensor, position_bias: Tensor, **kwargs: Any) -> Any:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PackedCache):
        return type(module).forward(module, hidden, position_bias, **kwargs)
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        part[0].view(-1, module.n_heads, module.head_dim).transpose(0, 1) for part in mixed.chunk(3, dim=2)
    )
    # The bias ends with the last key; a softmax does not see a constant, so its last M columns serve every length.
    bias = position_bias[:, 0, position_bias.shape[-1] - cache.rows.longest :]
    scores = Scores(scale=module.softmax_scale, position_bias=bias)
    return module.out_proj(attend(cache.rows, module, query, key, value, scores).flatten(1)[None]), None


def _falcon(module: Any, hidden: Tensor, alibi: Tensor | None, attention_mask: Any, **kwargs: Any) -> Any:
    cache = kwargs.get("layer_past")
    if not isinstance(cache, PackedCache):
        return type(module).forward(module, hidden, alibi, attention_mask, **kwargs)
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(hidden)))
    bias = None
    if alibi is None:
        query, key = falcon_rotary(query, key, *kwargs["position_embeddings"])
    else:
        bias = cache.rows.once("alibi", lambda: _falcon_alibi(module, cache.rows, hidden))
    scores = Scores(scale=module.inv_norm_factor, position_bias=bias)
    mixed = attend(cache.rows, module, query[0], key[0], value[0], scores)
    return module.dense(mixed.flatten(1)[None]), None


def _falcon_alibi(module: Any, rows: CarriedRows, like: Tensor) -> Tensor:
    ones = torch.ones(1, rows.longest, dtype=torch.long, device=like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    bias: Tensor = falcon_alibi(ones, module.num_heads, wide)[:, 0]
    return bias * float(module.inv_norm_factor)


def _gpt_attn(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    if not isinstance(attention_mask, PackedMask):
        return type(module)._attn(module, query, key, value, attention_mask)
    is_local = getattr(module, "attention_type", None) == "local"
    scores = Scores(
        scale=1 / float(getattr(module, "scale_attn", 1.0)),  # GPT-Neo does not scale
        window=module.config.window_size if is_local else None,
        upcast=True,
    )
    mixed = attend(attention_mask.rows, module, query[0], key[0], value[0], scores)
    return mixed.transpose(0, 1)[None], None


_METHODS: dict[str, tuple[str, Method]] = {
    "BloomAttention": ("forward", _bloom),
    "MptAttention": ("forward", _mpt),
    "FalconAttention": ("forward", _falcon),
    "GPTJAttention": ("_attn", _gpt_attn),
    "GPTNeoSelfAttention": ("_attn", _gpt_attn),
    "CodeGenAttention": ("_attn", _gpt_attn),
}
