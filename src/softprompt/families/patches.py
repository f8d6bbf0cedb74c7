"""Every change that is made to a model, all of them reversible: a new architecture is one more entry here.

`_KERNELS` compute a module's own formula by a faster exact kernel, inside `FrozenLinearKernels.active()` only.
`_ATTENTION` lets a family's attention compute our batches, between the module's own projections; the families that look
their attention up in transformers' attention interface need no entry, the implementation is replaced there. Each
decoder layer is wrapped so that it is checkpointed when the batch asks for it.

No family's file is imported here: a patch finds the family's own functions in the file of the module that it is on.

A patch is a method on the module itself (its class stays as it is) that calls the class's own method, with the same
arguments, when it is not given a batch: then the model computes the same bits as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from softprompt.families.attention import attend
from softprompt.families.batch import (
    AttentionBatch,
    BatchCache,
    BatchMask,
    Carrier,
    PackedBatch,
    Scoring,
    once,
)
from softprompt.families.frozen_linear import FrozenLinearKernels, active_kernels, frozen_linear
from softprompt.families.seq2seq_attention import POSITION_TABLES, SEQ2SEQ_ATTENTION, position_table
from softprompt.families.thin_linear import can_normalise, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "softprompt_"  # of our implementations in transformers' attention interface
_REPLACED = ("sdpa", "eager")
_CHOOSES_KEYS = ("index_topk", "index_topk_blocks", "keep_window_size")  # settings of families that leave keys out
_CHANGES_SCORES = ("s_aux", "position_bias", "sinks", "head_mask")  # arguments that our attention does not compute


@dataclass(frozen=True)
class Patch:
    """A method to put on a module."""

    name: str  # of the method that it replaces
    method: Callable[..., Any]  # with the module as its first argument
    carrier: Carrier | None = None  # for attention: the argument that brings a batch to the method


def install_kernels(model: nn.Module) -> None:
    """Replace linear layers, norms and activations that have a faster exact kernel."""
    for module in model.modules():
        patch = _KERNELS.get(type(module)) or _KERNELS.get(type(module).__name__)
        if patch is not None:
            _put(module, patch)


def install_attention(model: PreTrainedModel) -> Carrier | None:
    """Let the model's attention compute our batches, and its layers be checkpointed; None where the family cannot."""
    carrier = _patch_modules(model) or _replace_implementation(model)
    if carrier is not None:
        for layer in decoder_layers(model):
            _put(layer, _CHECKPOINT)
    return carrier


def remove_attention(model: PreTrainedModel) -> None:
    """Undo `install_attention`."""
    for module, patch in _attention_patches(model):
        _take_off(module, patch)
    for layer in decoder_layers(model):
        _take_off(layer, _CHECKPOINT)
    implementation = model.config._attn_implementation
    model.config._attn_implementation_internal = implementation.removeprefix(_PREFIX)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, or an encoder's, in order; none where a family keeps them otherwise.

    ALBERT's groups of layers run several times each.
    """
    if model.config.is_encoder_decoder:
        halves: Any = (model.get_encoder(), model.get_decoder())  # Any: transformers' own look-up
        lists = (child for half in halves for child in half.children() if isinstance(child, nn.ModuleList))
        return [layer for layers in lists for layer in layers]
    config = model.config.get_text_config()
    for count in (getattr(config, name, None) for name in ("num_hidden_layers", "num_hidden_groups")):
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    return []


def _put(module: nn.Module, patch: Patch) -> None:
    vars(module).setdefault(patch.name, MethodType(patch.method, module))


def _take_off(module: nn.Module, patch: Patch) -> None:
    vars(module).pop(patch.name, None)


def _patch_modules(model: PreTrainedModel) -> Carrier | None:
    carrier = None
    for module, patch in _attention_patches(model):
        _put(module, patch)
        carrier = patch.carrier
    return carrier


def _attention_patches(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Patch]]:
    for module in model.modules():
        if type(module).__name__ in _ATTENTION:
            yield module, _ATTENTION[type(module).__name__]


def _replace_implementation(model: PreTrainedModel) -> Carrier | None:
    """Register an implementation of our own that falls back on the model's, and select it."""
    before = model.config._attn_implementation
    if before.startswith(_PREFIX):
        return "mask"
    if before not in _REPLACED or (before == "eager" and getattr(model.config, "reorder_and_upcast_attn", False)):
        return None  # GPT-2 upcasts only under the name "eager"
    text = model.config.get_text_config(decoder=True)
    if any(getattr(text, name, None) is not None for name in _CHOOSES_KEYS):
        return None  # only a row longer than any check would show it
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = _PREFIX + before
    AttentionInterface.register(name, _in_front_of(before))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation_internal = name
    return "mask"


def _in_front_of(before: str) -> Any:  # Any: transformers' attention functions get whatever their family passes
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, BatchMask):
            scoring = scoring_of(module, query, kwargs)
            return attend(attention_mask.batch, module, query[0], key[0], value[0], scoring)[None], None
        result: tuple[Tensor, Tensor | None] = _original(before, module)(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    return attention


def _original(before: str, module: nn.Module) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if before in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[before]
    return _own_file(module).eager_attention_forward  # every family file has its own


def _own_file(module: nn.Module) -> Any:  # Any: a module of Python's, with the family's functions
    """The file that defines the module's class, which has been imported, for there is such a module."""
    return sys.modules[type(module).__module__]


def scoring_of(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> Scoring:
    """What a family asks of its attention function. Raises NotImplementedError where that is more than we compute."""
    unknown = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"packed attention does not compute {', '.join(unknown)}")
    scaling = kwargs.get("scaling")
    return Scoring(
        scale=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        window=_window(module, kwargs),
        softcap=kwargs.get("softcap"),
    )


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The layer's sliding window. A family that has it in its masks only cannot be packed."""
    if "sliding_window" in kwargs:
        found: int | None = kwargs["sliding_window"]
        return found
    config = getattr(module, "config", None)
    hidden = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None) is not None]
    if hidden:
        raise NotImplementedError(f"its {hidden[0]} is not an argument of its attention")
    return None


def _bloom(module: Any, hidden: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    cache = kwargs.get("layer_past")
    if not isinstance(cache, BatchCache):
        return type(module).forward(module, hidden, residual, alibi, attention_mask, **kwargs)
    query, key, value = (part[0] for part in module._reshape(module.query_key_value(hidden)))
    bias = once(cache.batch, "alibi", lambda: _bloom_alibi(module, cache.batch, hidden))
    scoring = Scoring(scale=module.inv_norm_factor, position_bias=bias)
    attended = attend(cache.batch, module, query, key, value, scoring)
    return residual + module.dense(attended.flatten(1)[None]), None


def _bloom_alibi(module: Any, batch: AttentionBatch, like: Tensor) -> Tensor:
    """[h, M] float32, whatever the base's dtype."""
    ones = torch.ones(1, batch.max_keys, dtype=torch.long, device=like.device)
    bias: Tensor = _own_file(module).build_alibi_tensor(ones, module.num_heads, torch.float32)[:, 0]
    return bias


def _mpt(module: Any, hidden: Tensor, position_bias: Tensor, **kwargs: Any) -> Any:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, BatchCache):
        return type(module).forward(module, hidden, position_bias, **kwargs)
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        part[0].view(-1, module.n_heads, module.head_dim).transpose(0, 1) for part in mixed.chunk(3, dim=2)
    )
    # The bias ends with the last key; a softmax ignores a constant, so its last M columns serve every length.
    bias = position_bias[:, 0, position_bias.shape[-1] - cache.batch.max_keys :]
    scoring = Scoring(scale=module.softmax_scale, position_bias=bias)
    return module.out_proj(attend(cache.batch, module, query, key, value, scoring).flatten(1)[None]), None


def _falcon(module: Any, hidden: Tensor, alibi: Tensor | None, attention_mask: Any, **kwargs: Any) -> Any:
    cache = kwargs.get("layer_past")
    if not isinstance(cache, BatchCache):
        return type(module).forward(module, hidden, alibi, attention_mask, **kwargs)
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(hidden)))
    bias = None
    if alibi is None:
        query, key = _own_file(module).apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
    else:
        bias = once(cache.batch, "alibi", lambda: _falcon_alibi(module, cache.batch, hidden))
    scoring = Scoring(scale=module.inv_norm_factor, position_bias=bias)
    attended = attend(cache.batch, module, query[0], key[0], value[0], scoring)
    return module.dense(attended.flatten(1)[None]), None


def _falcon_alibi(module: Any, batch: AttentionBatch, like: Tensor) -> Tensor:
    ones = torch.ones(1, batch.max_keys, dtype=torch.long, device=like.device)
    wide = torch.promote_types(like.dtype, torch.float32)
    bias: Tensor = _own_file(module).build_alibi_tensor(ones, module.num_heads, wide)[:, 0]
    return bias * float(module.inv_norm_factor)


def _gpt_attn(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    if not isinstance(attention_mask, BatchMask):
        return type(module)._attn(module, query, key, value, attention_mask)
    is_local = getattr(module, "attention_type", None) == "local"
    scoring = Scoring(
        scale=1 / float(getattr(module, "scale_attn", 1.0)),  # GPT-Neo does not scale
        window=module.config.window_size if is_local else None,
        upcast=True,
    )
    attended = attend(attention_mask.batch, module, query[0], key[0], value[0], scoring)
    return attended.transpose(0, 1)[None], None


_ATTENTION: dict[str, Patch] = {
    **{name: Patch("forward", method, "mask") for name, method in SEQ2SEQ_ATTENTION.items()},
    "BloomAttention": Patch("forward", _bloom, "cache"),
    "MptAttention": Patch("forward", _mpt, "cache"),
    "FalconAttention": Patch("forward", _falcon, "cache"),
    "GPTJAttention": Patch("_attn", _gpt_attn, "mask"),
    "GPTNeoSelfAttention": Patch("_attn", _gpt_attn, "mask"),
    "CodeGenAttention": Patch("_attn", _gpt_attn, "mask"),
}


def _linear(module: nn.Linear, rows: Tensor) -> Tensor:
    found = frozen_linear(rows, module.weight, module.bias)
    return nn.Linear.forward(module, rows) if found is None else found


def _conv1d(module: Conv1D, rows: Tensor) -> Tensor:
    found = frozen_linear(rows, module.weight, module.bias, is_transposed=True)
    whole: Tensor = Conv1D.forward(module, rows) if found is None else found
    return whole


def _gelu(module: Any, inputs: Tensor) -> Tensor:
    """The tanh approximation of GELU, which these families write out in eight elementwise operations, in one.

    The same formula in float32, rounded once, and nothing but the input is saved.
    """
    if active_kernels() is None or inputs.dtype is torch.float64:
        written_out: Tensor = type(module).forward(module, inputs)
        return written_out
    return torch.nn.functional.gelu(inputs, approximate="tanh")


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    """RMSNorm, which these families write out in six elementwise operations, in one call; without gradient."""
    is_ours = active_kernels() is not None and not torch.is_grad_enabled() and can_normalise(hidden, module.weight)
    if not is_ours:
        written_out: Tensor = type(module).forward(module, hidden)
        return written_out
    return rms_norm(hidden, module.weight, module.variance_epsilon)


# Classes whose forward is that of LlamaRMSNorm; others multiply by 1 + weight, or round elsewhere.
_RMS_NORM_FAMILIES = """
    Apertus DeepseekV2 DeepseekV3 Ernie4_5 Exaone4 FalconH1 Glm Glm4 Granite GraniteMoe HunYuanDenseV1 Jamba Lfm2 Llama
    Ministral Ministral3 Mistral Mixtral Olmoe Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe SeedOss SmolLM3
"""
RMS_NORMS = (
    *(f"{family}RMSNorm" for family in _RMS_NORM_FAMILIES.split()),
    *(f"{family}LayerNorm" for family in ("T5", "MT5", "UMT5")),
)

_KERNELS: dict[type | str, Patch] = {
    nn.Linear: Patch("forward", _linear),
    Conv1D: Patch("forward", _conv1d),
    **dict.fromkeys(("BloomGelu", "NewGELUActivation", "FastGELUActivation"), Patch("forward", _gelu)),
    **dict.fromkeys(RMS_NORMS, Patch("forward", _rms_norm)),
    **dict.fromkeys(POSITION_TABLES, Patch("forward", position_table)),
}


def _checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Activation checkpointing (Chen et al. 2016, 1604.06174), if the batch asks for it.

    transformers has it in training mode only, and the base stays in eval mode.
    """
    if torch.is_grad_enabled() and any(_wants_checkpoint(value) for value in (*args, *kwargs.values())):
        return checkpoint(_run_layer, active_kernels(), layer, *args, use_reentrant=False, **kwargs)
    return type(layer).forward(layer, *args, **kwargs)


def _run_layer(kernels: FrozenLinearKernels | None, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The second run happens in the backward pass, and has to use the same kernels."""
    with kernels.active() if kernels is not None else nullcontext():
        return type(layer).forward(layer, *args, **kwargs)


def _wants_checkpoint(value: object) -> bool:
    if not isinstance(value, BatchMask | BatchCache):
        return False
    return isinstance(value.batch, PackedBatch) and value.batch.checkpoint


_CHECKPOINT = Patch("forward", _checkpointed)
