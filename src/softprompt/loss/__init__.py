"""Summed negative log-likelihood over counted targets: for training, evaluation and the engine."""

from softprompt.loss.chunked import nll, weighted_nll
from softprompt.loss.labels import weighted_label_nll
from softprompt.loss.objective import (
    NO_LABEL,
    Objective,
    ObjectiveWeights,
    head_outputs,
    label_word_ids,
    num_labels,
    objective,
    states_of,
)
from softprompt.loss.score import RowScore, alternative_nlls, score_examples, score_under, target_nlls

__all__ = [
    "NO_LABEL", "Objective", "ObjectiveWeights", "RowScore", "alternative_nlls", "head_outputs", "label_word_ids",
    "nll", "num_labels", "objective", "score_examples", "score_under", "states_of", "target_nlls", "weighted_label_nll",
    "weighted_nll",
]  # fmt: skip
