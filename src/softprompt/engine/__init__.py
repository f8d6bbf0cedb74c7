"""Generation: answers under soft prompts. Knows neither training, nor the server, nor the disk."""

from softprompt.engine.generate import Answer, FinishReason, Request, generate

__all__ = ["Answer", "FinishReason", "Request", "generate"]
