"""Packed attention for the families that look their attention up in transformers' attention interface.

Installed once per model, under a name of its own. Without a `PackedMask` it calls what was there before, with the same
arguments, and the masks are made as before: bit-equal. With one, the layer's own queries, keys and values go to
`families.attention`.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompt.families.attend import attend
from softprompt.families.packed import Carrier, PackedMask
from softprompt.families.scores import Scores

_PREFIX = "softprompt_"
_BEFORE = ("sdpa", "eager")  # the implementations that we stand in front of
_CHOOSES_KEYS = ("index_topk", "index_topk_blocks", "keep_window_size")  # settings of families that leave keys out
_CHANGES_SCORES = ("s_aux", "position_bias", "sinks", "head_mask")  # arguments that packed attention has no part for


def install(model: PreTrainedModel) -> Carrier | None:
    """Stand in front of the model's attention; None where its implementation is none that we know."""
    before = model.config._attn_implementation
    if before.startswith(_PREFIX):
        return "mask"
    if before not in _BEFORE or (before == "eager" and getattr(model.config, "reorder_and_upcast_attn", False)):
        return None  # GPT-2's upcasting asks for the name "eager"
    text = model.config.get_text_config(decoder=True)
    if any(getattr(text, name, None) is not None for name in _CHOOSES_KEYS):
        return None  # only a row longer than any check would show it
    name = _PREFIX + before
    AttentionInterface.register(name, _in_front_of(before))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation_internal = name
    return "mask"


def remove(model: PreTrainedModel) -> None:
    """Put back what was there."""
    name = model.config._attn_implementation
    model.config._attn_implementation_internal = name.removeprefix(_PREFIX)


def _in_front_of(before: str) -> Any:  # Any: transformers' attention functions take what their family gives them
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, PackedMask):
            return _packed(module, query, key, value, attention_mask, **kwargs), None
        result: tuple[Tensor, Tensor | None] = _original(before, module)(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    return attention


def _original(before: str, module: nn.Module) -> Any:
    if before in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[before]
    return sys.modules[type(module).__module__].eager_attention_forward  # every family file has its own


def _packed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, **kwargs: Any) -> Tensor:
    unknown = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"packed attention has no part for {', '.join(unknown)}")
    scaling = kwargs.get("scaling")
    scores = Scores(
        scale=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        window=_window(module, kwargs),
        softcap=kwargs.get("softcap"),
    )
    return attend(mask.rows, module, query[0], key[0], value[0], scores)[None]


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The layer's sliding window. A family that keeps it in its masks only cannot be packed."""
    if "sliding_window" in kwargs:
        found: int | None = kwargs["sliding_window"]
        return found
    config = getattr(module, "config", None)
    hidden = [name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None) is not None]
    if hidden:
        raise NotImplementedError(f"its {hidden[0]} is not an argument of its attention")
    return None
