"""The first weights of a head: a logistic regression on the base's states of the training rows behind the first prompt.

So a classifier starts as the linear probe of its rows, and the soft prompt is trained to be better than that; a random
head would first have to learn what the states can already say, by small steps, while the prompt moves with it. The last
linear layer is solved for, on states of mean square norm 1 around their mean and with the L2 penalty of 1 that
scikit-learn has by default; the layers before it are drawn. Figures are in docs/encoders.md.

N states, F features of the last layer, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.compute_share import yield_point
from softprompt.families import Forward
from softprompt.families.task_head import TaskHead
from softprompt.loss import NO_LABEL, Objective
from softprompt.loss.objective import by_length
from softprompt.splice import Row, column_states
from softprompt.training.ranks import Ranks
from softprompt.types import Example

MOST_ROWS = 2_000  # that are looked at, spread over all of them
_MOST_ITERATIONS = 500
_GRADIENT_TOLERANCE = 1e-6  # of the summed loss


def fitted_head(
    base: Base, forward: Forward, trained: Objective, examples: Sequence[Example], start_PH: Tensor, seed: int,
    ranks: Ranks,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights as of `TaskHead.start`, the last layer's fitted to the examples; those of the first of several ranks."""
    head = trained.head
    assert head is not None
    weights = head.start(seed)
    read = _last_inputs(base, forward, trained, _spread(examples), start_PH, weights)
    if read is not None:
        weights |= fitted_layer(head, weights, *read)
    mine = {name: weight if ranks.rank == 0 else torch.zeros_like(weight) for name, weight in weights.items()}
    ranks.sum(list(mine.values()))
    return mine


def _spread(examples: Sequence[Example]) -> list[Example]:
    step = max(1, -(-len(examples) // MOST_ROWS))
    return list(examples[::step])


@torch.no_grad()
def _last_inputs(
    base: Base, forward: Forward, trained: Objective, examples: Sequence[Example], start_PH: Tensor,
    weights: Mapping[str, Tensor],
) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """What the head's last layer reads [N, F] in float64, and the labels [N]; None where it has no such layer."""
    assert trained.head is not None
    features, labels = [], []
    rows = [Row.of(example, 0, ()) for example in examples]
    for batch in by_length([len(row.ids) + len(start_PH) for row in rows]):
        yield_point()
        some = [rows[number] for number in batch]
        states_ND = trained.head_states(*column_states(base, forward, some, [start_PH]), some)
        read = trained.head.last_inputs(weights, states_ND)
        if read is None:
            return None
        features.append(read.double().cpu())
        labels += [label for row in some for label in row.labels]
    counted = np.array(labels) != NO_LABEL
    return torch.cat(features).numpy()[counted], np.array(labels)[counted]


def fitted_layer(
    head: TaskHead, weights: Mapping[str, Tensor], features_NF: np.ndarray, labels_N: np.ndarray
) -> dict[str, Tensor]:
    """The last layer's `weight` [C, F] and, where it has one, `bias` [C]; none where the features are no numbers."""
    name, bias_name = f"{head.last_layer}.weight", f"{head.last_layer}.bias"
    has_bias = bias_name in weights
    mean_F = features_NF.mean(axis=0) if has_bias else np.zeros(features_NF.shape[1])
    scale = float(np.sqrt(np.mean(np.sum((features_NF - mean_F) ** 2, axis=1)))) or 1.0
    if not np.isfinite(scale):
        return {}
    weight_CF, bias_C = logistic_regression((features_NF - mean_F) / scale, labels_N, head.num_labels, has_bias)
    weight_CF = weight_CF / scale
    fitted = {name: torch.from_numpy(weight_CF).to(weights[name])}
    if has_bias:
        fitted[bias_name] = torch.from_numpy(bias_C - weight_CF @ mean_F).to(weights[bias_name])
    return fitted


def logistic_regression(
    features_NF: np.ndarray, labels_N: np.ndarray, num_labels: int, has_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weight [C, F] and bias [C] that minimise the summed cross-entropy plus half their squares; the minimum is one.

    Without `has_bias` the bias is zero.
    """
    from scipy.optimize import minimize  # a third of a second, and only a fitted head needs it
    from scipy.special import logsumexp, softmax

    count, width = features_NF.shape
    targets_NC = np.eye(num_labels)[labels_N]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        yield_point()
        matrix = flat.reshape(num_labels, width + 1)
        logits_NC = features_NF @ matrix[:, :width].T + has_bias * matrix[:, width]
        nats = logsumexp(logits_NC, axis=1).sum() - logits_NC[np.arange(count), labels_N].sum()
        errors_NC = softmax(logits_NC, axis=1) - targets_NC
        gradient = np.concatenate([errors_NC.T @ features_NF, has_bias * errors_NC.sum(axis=0)[:, None]], axis=1)
        return float(nats + 0.5 * flat @ flat), (gradient + matrix).ravel()

    found = minimize(
        loss_and_gradient, np.zeros(num_labels * (width + 1)), jac=True, method="L-BFGS-B",
        options={"maxiter": _MOST_ITERATIONS, "gtol": _GRADIENT_TOLERANCE, "ftol": 1e-15},
    ).x.reshape(num_labels, width + 1)  # fmt: skip
    return found[:, :width], found[:, width]
