"""Activation checkpointing of packed rows, layer by layer (Chen et al. 2016, 1604.06174).

transformers checkpoints in training mode only, and the base stays in eval mode; so each decoder layer is asked whether
the rows that it is given want it. Without packed rows the layer's own forward runs.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from softprompt.families.own_attention import PackedCache
from softprompt.families.packed import PackedMask
from softprompt.families.products import FrozenLinearKernels, active_kernels


def install(model: PreTrainedModel) -> None:
    """Put the question before each decoder layer's forward."""
    for layer in decoder_layers(model):
        if "forward" not in vars(layer):
            layer.forward = MethodType(_forward, layer)


def remove(model: PreTrainedModel) -> None:
    for layer in decoder_layers(model):
        vars(layer).pop("forward", None)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() and any(_wanted(value) for value in (*args, *kwargs.values())):
        return checkpoint(_run_layer, active_kernels(), layer, *args, use_reentrant=False, **kwargs)
    return type(layer).forward(layer, *args, **kwargs)


def _run_layer(products: FrozenLinearKernels | None, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The second run comes from the backward pass, and has to take the same products."""
    with products.active() if products is not None else nullcontext():
        return type(layer).forward(layer, *args, **kwargs)


def _wanted(value: object) -> bool:
    return isinstance(value, PackedMask | PackedCache) and value.rows.checkpoint


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order; none where a family keeps them otherwise."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []
