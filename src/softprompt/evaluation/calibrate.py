"""Temperature scaling: the scores of labels as probabilities that can be believed.

One number, the temperature T, divides the scores before the softmax; the order of the labels, and so every answer,
stays what it is. T minimises the cross-entropy of the validation rows' own labels (Guo et al. 2017, "On Calibration of
Modern Neural Networks", arXiv 1706.04599). Few rows that are all right would make T nearly 0 and every confidence 1;
so a row's own label counts as 1 - 1 / (N + 2) and each label shares in the rest, as the targets of Platt (1999) do.

N rows, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softprompt.evaluation.classification import wilson_interval
from softprompt.prompt import Calibration, ThresholdChoice
from softprompt.prompt.calibration import LEAST_KEPT, rounded

_LEAST_SCALE, _GREATEST_SCALE = 1e-2, 1e4  # of 1 / T: scores that say nothing of the labels end at the first
_HALVINGS = 100


def calibrate(scores_NK: np.ndarray, own: Sequence[int]) -> Calibration:
    """The calibration of rows with these scores, whose true labels are `own`."""
    temperature = fit_temperature(scores_NK, own)
    confidences = rounded(probabilities(scores_NK, temperature).max(axis=1).tolist())
    is_right = scores_NK.argmax(axis=1) == np.array(own)
    right, wrong = (
        tuple(sorted(each for each, found in zip(confidences, is_right, strict=True) if found == wanted))
        for wanted in (True, False)
    )
    return Calibration(temperature=temperature, right=right, wrong=wrong)


def probabilities(scores_NK: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[N, K]: softmax of the scores divided by the temperature; each row sums to 1."""
    scaled_NK = scores_NK.astype(np.float64) / temperature
    shares_NK = np.exp(scaled_NK - scaled_NK.max(axis=1, keepdims=True))
    normed_NK: np.ndarray = shares_NK / shares_NK.sum(axis=1, keepdims=True)
    return normed_NK


def fit_temperature(scores_NK: np.ndarray, own: Sequence[int]) -> float:
    """T, by halving: the cross-entropy is convex in 1 / T, so its slope crosses 0 once. 1.0 for equal scores."""
    scores_NK = scores_NK.astype(np.float64)
    if not np.ptp(scores_NK, axis=1).any():
        return 1.0
    low, high = np.log(_LEAST_SCALE), np.log(_GREATEST_SCALE)
    targets_NK = smoothed_targets(own, scores_NK.shape[1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _slope(scores_NK, targets_NK, np.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def smoothed_targets(own: Sequence[int], num_labels: int) -> np.ndarray:
    """[N, K]: what each label of each row counts; see the module's docstring."""
    rest = 1 / (len(own) + 2)
    targets_NK = np.full((len(own), num_labels), rest / num_labels)
    targets_NK[np.arange(len(own)), own] += 1 - rest
    return targets_NK


def _slope(scores_NK: np.ndarray, targets_NK: np.ndarray, scale: float) -> float:
    """The derivative of the summed cross-entropy by 1 / T."""
    return float(((probabilities(scores_NK, 1 / scale) - targets_NK) * scores_NK).sum())


_FEW_ROWS = 100  # on which a threshold is only a rough one


def threshold_line(calibration: Calibration, target_accuracy: float) -> str:
    """The threshold for this accuracy, and what it kept of the validation rows, in one sentence."""
    choice = calibration.choose(target_accuracy)
    rows = f"the {calibration.rows:,} validation rows"
    if choice is None:
        return (
            f"on {rows} no confidence is enough to be right in {target_accuracy:.0%} of {LEAST_KEPT} rows or more, so "
            "every answer is unsure; --target-accuracy asks for less, --threshold sets one"
        )
    few = "; chosen on so few rows, it is a rough one" if calibration.rows < _FEW_ROWS else ""
    return f"an answer is sure at a confidence of {choice.threshold:.3f} or more: {_kept(choice, rows)}{few}"


def _kept(choice: ThresholdChoice, rows: str) -> str:
    interval = wilson_interval(choice.right, choice.kept)
    share = f"right in {choice.right / choice.kept:.1%} of them ({interval.low:.1%} to {interval.high:.1%} at 95 %)"
    return f"{choice.kept:,} of {rows}, {share}"
