"""Rotary positions that depend on the longest row of a forward: dynamic NTK scaling and LongRoPE (2402.13753).

Beyond the length that the base was first trained on, the frequencies change with the longest position present. A row
that long has to run by itself, and its prompt with it, to get what it would get alone.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def length_of_fixed_rotation(model: PreTrainedModel) -> int | None:
    """Tokens, virtual ones included, up to which a row's positions do not depend on its company; None: always."""
    limits = [
        int(limit)
        for module in model.modules()
        if "dynamic" in (kind := str(getattr(module, "rope_type", ""))) or kind == "longrope"
        if (limit := _limit(module, model)) is not None
    ]
    return min(limits, default=None)


def _limit(module: object, model: PreTrainedModel) -> int | None:
    config = getattr(module, "config", model.config)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    found: int | None = original or getattr(config, "max_position_embeddings", None)
    return found
