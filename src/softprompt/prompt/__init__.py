"""The trained tensor [P, H], its starts, and looking inside: nearest tokens, drift, similarity."""

from softprompt.prompt.calibration import Calibration, ThresholdChoice
from softprompt.prompt.drift import Drift, drift, drift_from_json
from softprompt.prompt.judgement import Judgement
from softprompt.prompt.similarity import (
    NearestTokens,
    SimilarPair,
    mean_embedding,
    nearest_tokens,
    similar_pairs,
    similarity,
)
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.prompt.start import StartTexts, starting_tensor

__all__ = [
    "Calibration", "Drift", "Judgement", "NearestTokens", "SimilarPair", "SoftPrompt", "StartTexts", "ThresholdChoice",
    "drift", "drift_from_json", "mean_embedding", "nearest_tokens", "similar_pairs", "similarity", "starting_tensor",
]  # fmt: skip
