"""The trained tensor [P, H], its starts, its nearest tokens."""

from softprompt.prompt.nearest import NearestTokens, nearest_tokens
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.prompt.start import StartTexts, starting_tensor

__all__ = ["NearestTokens", "SoftPrompt", "StartTexts", "nearest_tokens", "starting_tensor"]
