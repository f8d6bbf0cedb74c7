"""Prompt tuning on a frozen language model: train, compare, keep and use soft prompts.

Names are imported when they are first used, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.base import Base, freeze_base, load_base
    from softprompt.config import BaseConfig, DataConfig, EngineConfig, PredictConfig, SamplingConfig, TrainConfig
    from softprompt.data import read_rows, rows_from_records, rows_from_texts, split_rows
    from softprompt.engine import Answer, AsyncEngine, Engine, Request, generate
    from softprompt.errors import SoftpromptError
    from softprompt.evaluation import Comparison, Prediction, compare, predict
    from softprompt.prompt import SoftPrompt
    from softprompt.storage import Library, load_prompt, save_prompt
    from softprompt.training import Candidate, TrainResult, train, train_together

_HOME = {
    "Answer": "engine",
    "AsyncEngine": "engine",
    "Base": "base",
    "BaseConfig": "config",
    "Candidate": "training",
    "Comparison": "evaluation",
    "DataConfig": "config",
    "Engine": "engine",
    "EngineConfig": "config",
    "Library": "storage",
    "PredictConfig": "config",
    "Prediction": "evaluation",
    "Request": "engine",
    "SamplingConfig": "config",
    "SoftPrompt": "prompt",
    "SoftpromptError": "errors",
    "TrainConfig": "config",
    "TrainResult": "training",
    "compare": "evaluation",
    "freeze_base": "base",
    "generate": "engine",
    "load_base": "base",
    "load_prompt": "storage",
    "predict": "evaluation",
    "read_rows": "data",
    "rows_from_records": "data",
    "rows_from_texts": "data",
    "save_prompt": "storage",
    "split_rows": "data",
    "train": "training",
    "train_together": "training",
}

__all__ = [
    "Answer",
    "AsyncEngine",
    "Base",
    "BaseConfig",
    "Candidate",
    "Comparison",
    "DataConfig",
    "Engine",
    "EngineConfig",
    "Library",
    "PredictConfig",
    "Prediction",
    "Request",
    "SamplingConfig",
    "SoftPrompt",
    "SoftpromptError",
    "TrainConfig",
    "TrainResult",
    "compare",
    "freeze_base",
    "generate",
    "load_base",
    "load_prompt",
    "predict",
    "read_rows",
    "rows_from_records",
    "rows_from_texts",
    "save_prompt",
    "split_rows",
    "train",
    "train_together",
]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _HOME:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"softprompt.{_HOME[name]}"), name)
