"""The inputs by which a base is checked when it is first used, and when two answers count as the same."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from softprompt.base import Base
from softprompt.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ORDER = (2, 0, 5, 0, 7, 3)  # of the ids of a probe, among those that are not special
NUM_IDS, NUM_VIRTUAL = 5, 2
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative; some compute softmax in float32 in a float64 base
_TOLERANCE_16_BIT = 0.1


def probe_ids(base: Base, count: int = NUM_IDS) -> Tensor:
    """[1, count], no special tokens: a pad may have no position, an image's token no embedding."""
    config = base.model.config
    special = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    found = [token for token in range(3, base.vocab_size) if token not in special]
    ids = [found[_ORDER[index % len(_ORDER)] % len(found)] for index in range(count)]
    return torch.tensor([ids], device=base.device)


def some_prompt(base: Base, seed: int) -> Tensor:
    """[P, H], of the size of the base's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_VIRTUAL, base.hidden_size, generator=generator) * base.embedding_rms


def first_positions(base: Base, model: nn.Module) -> list[int | None]:
    """Where a model's positions may begin, to be tried one after the other; None: it counts by itself."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return [None]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    pads = {table.padding_idx for table in tables} | {getattr(base.model.config, "pad_token_id", None)}
    behind_pad = sorted({pad + 1 for pad in pads if pad is not None and pad >= 0})  # RoBERTa's first position
    return [0, *behind_pad, None]


def own_logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """[S, V] as the model itself gives them, with nothing but its inputs."""
    logits: Tensor = model(**inputs).logits
    return logits[0].to(next(iter(inputs.values())).device)


def is_close(ours: Tensor, reference: Tensor) -> bool:
    """Whether two ways to the same logits differ by rounding only; NaN is never close."""
    if ours.shape != reference.shape:
        return False
    tolerance = _TOLERANCE.get(reference.dtype, _TOLERANCE_16_BIT)
    return bool((ours - reference).abs().max() <= tolerance * reference.abs().max().clamp(min=1e-3))


def max_batchable_length(model: PreTrainedModel) -> int | None:
    """Tokens, virtual ones included, up to which a row's positions do not depend on the rest of its batch; None: never.

    Dynamic RoPE (NTK scaling, and LongRoPE, 2402.13753): beyond the length that the base was first trained on, the
    longest sequence changes the whole batch's frequencies, so it runs alone, and its soft prompt with it.
    """
    limits = [
        int(limit)
        for module in model.modules()
        if "dynamic" in (kind := str(getattr(module, "rope_type", ""))) or kind == "longrope"
        if (limit := _original_length(module, model)) is not None
    ]
    return min(limits, default=None)


def _original_length(module: object, model: PreTrainedModel) -> int | None:
    config = getattr(module, "config", model.config)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    found: int | None = original or getattr(config, "max_position_embeddings", None)
    return found


def refused(base: Base, reason: str) -> BaseModelError:
    kind = base.model.config.model_type
    return BaseModelError(f"base {base.name!r} ({kind}) cannot take a soft prompt: {reason}")


def why(model: PreTrainedModel, error: Exception) -> str:
    """One line of what was raised, or what is behind it."""
    forwards = (model.forward, model.base_model.forward)
    if not any("inputs_embeds" in inspect.signature(forward).parameters for forward in forwards):
        return "its forward takes token ids and no embeddings"
    return "it raised " + " ".join(f"{type(error).__name__}: {error}".split())[:200]
