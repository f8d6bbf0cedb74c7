"""The masked-LM head of an encoder as a function of hidden states: the model's own forward, its backbone stood in for.

Families put other things between hidden states and logits (a layer, a norm, an activation, a bias), so the head is the
class of transformers itself, run over a backbone that returns the states that it is given. A second one, whose output
embeddings return what they are given, has the features that they multiply, so that a few words' logits cost a few rows.

N states, D hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from softprompt.base import Base
from softprompt.families.frozen_linear import FrozenLinearKernels
from softprompt.families.head import Head
from softprompt.families.probes import is_close, probe_ids

_NUM_STATES = 3  # of a probe


def masked_head(base: Base, kernels: FrozenLinearKernels) -> Head:
    """The head of a masked language model; where the model has none, one that raises when it is asked for logits."""
    model, linear = base.model, base.model.get_output_embeddings()
    name = base.name
    if model.base_model is model or linear is None:
        return Head(
            kernels=kernels, refusal=f"base {name!r} has no head for masked words; give a masked language model"
        )
    over_states = _replaced(model, [model.base_model_prefix], _Given(model.base_model))
    whole = _Logits(over_states)
    if not _is_own_head(base, whole):
        return Head(kernels=kernels, refusal=f"base {name!r}: its head for masked words does not run on hidden states")
    path = next((path for path, module in over_states.named_modules() if module is linear), None)
    if path is None or type(linear) is not nn.Linear:
        return Head(whole, kernels=kernels)
    features = _Logits(_replaced(over_states, path.split("."), nn.Identity()))
    states = _some_states(base)
    try:
        if is_close(linear(features(states)), whole(states)):
            return Head(linear, kernels=kernels, features=features)
    except Exception:  # its output embeddings are used in another way
        pass
    return Head(whole, kernels=kernels)


class _States(BaseModelOutput):
    """What a backbone returns: hidden states, and None for whatever else a family asks of it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for a backbone: the states that it is given are its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        vars(self)["backbone"] = backbone  # no part of this module

    def __getattr__(self, name: str) -> Any:  # Any: what some heads read of the backbone, DeBERTa's its embeddings
        return getattr(vars(self)["backbone"], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
        return _States(last_hidden_state=inputs_embeds)


class _Logits(nn.Module):
    """The first output of a model that stands over given states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: Tensor) -> Tensor:
        """[..., V] of [..., D]."""
        flat = states.reshape(1, -1, states.shape[-1])
        logits: Tensor = self.model(inputs_embeds=flat, return_dict=True).logits
        return logits.reshape(*states.shape[:-1], logits.shape[-1])


def _replaced(module: nn.Module, path: Sequence[str], part: nn.Module) -> nn.Module:
    """The module with another part at a path; it shares all others, and every weight, and the given one stays as is."""
    name, *rest = path
    copied = copy.copy(module)
    vars(copied)["_modules"] = dict(module._modules)
    for added in ("forward", "_hf_hook"):  # of patches and of Accelerate, bound to the module itself
        vars(copied).pop(added, None)
    inner = module._modules[name]
    assert inner is not None
    copied._modules[name] = _replaced(inner, rest, part) if rest else part
    return copied


def _is_own_head(base: Base, whole: nn.Module) -> bool:
    """Whether the head over the model's own states gives the model's own logits."""
    try:
        return is_close(whole(_some_states(base)), base.model(input_ids=probe_ids(base, _NUM_STATES)).logits[0])
    except Exception:  # a forward of another shape
        return False


def _some_states(base: Base) -> Tensor:
    states: Tensor = base.model.base_model(input_ids=probe_ids(base, _NUM_STATES))[0][0]
    return states
