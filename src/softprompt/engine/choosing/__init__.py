"""Choosing the next token of rows with unlike settings. Knows logits and ids; no model, text or scheduling."""

from softprompt.engine.choosing.chooser import Chooser, Chosen
from softprompt.engine.choosing.reporting import Alternatives, report
from softprompt.engine.choosing.rows import ChoosingRow

__all__ = ["Alternatives", "Chooser", "ChoosingRow", "Chosen", "report"]
