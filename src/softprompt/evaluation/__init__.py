"""Compare prompts with the bare base: answers, held-out loss, accuracy, task scores."""

import warnings
from typing import Any

from softprompt.config import ScoreConfig, TextScore
from softprompt.data import Input
from softprompt.evaluation.baselines import Baselines, Verdict, verdict_of
from softprompt.evaluation.classification import (
    Accuracy,
    ClassScore,
    accuracies,
    accuracy,
    accuracy_by_likelihood,
    label_answers,
    likeliest_labels,
)
from softprompt.evaluation.compare import BARE, Comparison, InputAnswers, compare
from softprompt.evaluation.ensemble import Ensembles, vote, vote_accuracies, vote_accuracy
from softprompt.evaluation.heldout import (
    HeldOutLoss,
    Interval,
    LeaveOneOut,
    LeftOut,
    held_out_losses,
    leave_one_out,
    mean_loss,
    paired_interval,
)
from softprompt.evaluation.judge import judge
from softprompt.evaluation.predict import Prediction, predict
from softprompt.evaluation.report import (
    ReportTable,
    accuracy_tables,
    answer_tables,
    class_tables,
    confusion_tables,
    ensemble_tables,
    is_small,
    loss_tables,
    memory_line,
    score_tables,
    to_markdown,
    verdict_lines,
)
from softprompt.evaluation.scores import CRITERIA, TaskScore, criterion

__all__ = [
    "BARE",
    "CRITERIA",
    "Accuracy",
    "Baselines",
    "ClassScore",
    "Comparison",
    "Ensembles",
    "HeldOutLoss",
    "Input",
    "InputAnswers",
    "Interval",
    "LeaveOneOut",
    "LeftOut",
    "Prediction",
    "ReportTable",
    "ScoreConfig",
    "TaskScore",
    "TextScore",
    "Verdict",
    "accuracies",
    "accuracy",
    "accuracy_by_likelihood",
    "accuracy_tables",
    "answer_tables",
    "class_tables",
    "compare",
    "confusion_tables",
    "criterion",
    "ensemble_tables",
    "held_out_losses",
    "is_small",
    "judge",
    "label_answers",
    "leave_one_out",
    "likeliest_labels",
    "loss_tables",
    "mean_loss",
    "memory_line",
    "paired_interval",
    "predict",
    "score_tables",
    "to_markdown",
    "verdict_lines",
    "verdict_of",
    "vote",
    "vote_accuracies",
    "vote_accuracy",
]

_RENAMED = {"Answered": "InputAnswers", "Table": "ReportTable"}


def __getattr__(name: str) -> Any:  # Any: a module's attribute
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"softprompt.evaluation.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
