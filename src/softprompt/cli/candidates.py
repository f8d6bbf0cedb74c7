"""What `--candidates K` tries: the given recipe first, then variations of what --vary names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from softprompt.config import DEFAULT_RELATIVE_LEARNING_RATE, TrainConfig
from softprompt.errors import ConfigError

VARIED = ("seed", "rate", "start", "length")
_RATES = (1.0, 3.0, 1 / 3, 10.0)  # times the given learning rate
_STARTS = ("data", "vocab")
_LENGTHS = (1.0, 0.5, 2.0)  # times the given number of virtual tokens


def vary(config: TrainConfig, count: int, what: Sequence[str]) -> dict[str, TrainConfig]:
    """`count` settings by name, no two alike: with seeds among `what`, any number; else every combination at most.

    Raises: ConfigError where there are not so many.
    """
    variants = _variants(config, what)
    if count > len(variants) and "seed" not in what:
        raise ConfigError(
            f"--candidates is {count}, but --vary {' '.join(what)} makes {len(variants)}; vary the seed too"
        )
    chosen = [
        replace(variants[index % len(variants)], seed=config.seed + (index if "seed" in what else 0))
        for index in range(count)
    ]
    return {f"c{index}": each for index, each in enumerate(chosen)}


def _variants(config: TrainConfig, what: Sequence[str]) -> list[TrainConfig]:
    found = [config]
    if "length" in what:
        found = [
            replace(each, virtual_tokens=max(round(each.virtual_tokens * by), 1)) for by in _LENGTHS for each in found
        ]
    if "start" in what:
        found = [each for start in _starts(config) for each in (replace(item, **start) for item in found)]
    if "rate" in what:
        found = [replace(each, **_rate(each, by)) for by in _RATES for each in found]
    return found


def _starts(config: TrainConfig) -> list[dict[str, Any]]:
    others = [start for start in _STARTS if start != config.init]
    return [{}, *({"init": start, "init_text": None} for start in others)]


def _rate(config: TrainConfig, by: float) -> dict[str, Any]:
    if config.learning_rate is not None:
        return {"learning_rate": config.learning_rate * by}
    relative = config.relative_learning_rate
    return {"relative_learning_rate": (DEFAULT_RELATIVE_LEARNING_RATE if relative is None else relative) * by}
