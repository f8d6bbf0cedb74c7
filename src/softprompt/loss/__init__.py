"""Summed negative log-likelihood over counted targets: for training, evaluation and the engine."""

from softprompt.loss.chunked import nll, weighted_nll
from softprompt.loss.labels import weighted_label_nll
from softprompt.loss.score import RowScore, score_examples, score_under, target_nlls

__all__ = [
    "RowScore", "nll", "score_examples", "score_under", "target_nlls", "weighted_label_nll",
    "weighted_nll",
]  # fmt: skip
