"""Generation: answers under soft prompts. Knows neither training, nor the server, nor the disk."""

from __future__ import annotations

import warnings
from typing import Any

from softprompt.engine.async_engine import AsyncEngine
from softprompt.engine.engine import Engine
from softprompt.engine.generate import generate
from softprompt.engine.model_runner import int8_note
from softprompt.engine.pooling import PoolingRequest
from softprompt.engine.request import (
    Aborted,
    AbortReason,
    Answer,
    Event,
    Failed,
    Finished,
    FinishReason,
    Pooled,
    PromptLogprobs,
    Request,
    Terminal,
    TokenLogProb,
    Tokens,
)
from softprompt.engine.stats import EngineStats

__all__ = [
    "AbortReason", "Aborted", "Answer", "AsyncEngine", "Engine", "EngineStats", "Event", "Failed", "FinishReason",
    "Finished", "Pooled", "PoolingRequest", "PromptLogprobs", "Request", "Terminal", "TokenLogProb", "Tokens",
    "generate", "int8_note",
]  # fmt: skip

_RENAMED = {"TextRead": "PromptLogprobs"}


def __getattr__(name: str) -> Any:  # Any: a module's attribute
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"softprompt.engine.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
