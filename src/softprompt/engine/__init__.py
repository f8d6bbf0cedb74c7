"""Generation: answers under soft prompts. Knows neither training, nor the server, nor the disk."""

from __future__ import annotations

from softprompt.engine.async_engine import AsyncEngine
from softprompt.engine.engine import Engine
from softprompt.engine.generate import generate
from softprompt.engine.request import (
    Aborted,
    AbortReason,
    Answer,
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    Terminal,
    TextRead,
    TokenLogProb,
    Tokens,
)
from softprompt.engine.stats import EngineStats

__all__ = [
    "AbortReason", "Aborted", "Answer", "AsyncEngine", "Engine", "EngineStats", "Event", "Failed", "FinishReason",
    "Finished", "Request", "Terminal", "TextRead", "TokenLogProb", "Tokens", "generate",
]  # fmt: skip
