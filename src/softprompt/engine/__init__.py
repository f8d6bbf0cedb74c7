"""Generation: answers under soft prompts. Knows neither training, nor the server, nor the disk."""

from softprompt.engine.asynchronous import AsyncEngine
from softprompt.engine.engine import Engine
from softprompt.engine.generate import generate
from softprompt.engine.requests import (
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
