"""The head of a task that is trained beside the soft prompt, computed by transformers' own class over given states.

`AutoModelForSequenceClassification`, `...TokenClassification` and `...QuestionAnswering` have, besides the backbone,
modules of their own: `classifier` of BERT, dense and out_proj of RoBERTa, `score` of decoders. Their weights, under
their names there, are what PEFT saves as `modules_to_save`.

N states, D hidden width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from softprompt.base import Base
from softprompt.types import InputForm, Task

HEADED_TASKS: tuple[Task, ...] = ("classify", "tag", "answer")


@dataclass(frozen=True)
class TaskHead:
    """How the states of one base become the logits of one task."""

    base: Base
    task: Task
    num_labels: int

    def start(self, seed: int) -> dict[str, Tensor]:
        """New weights, float32 on the CPU, by their names in transformers' class; drawn as it draws them."""
        raise NotImplementedError

    def logits(self, weights: Mapping[str, Tensor], states_ND: Tensor) -> Tensor:
        """Logits [N, C] of states; gradients flow into both. Of task "answer", C is 2: start and end of the span."""
        raise NotImplementedError

    def check(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raises AdapterError where names or shapes are not those of this head."""
        raise NotImplementedError


def task_head(base: Base, form: InputForm) -> TaskHead | None:
    """The head of the form's task on this base; None for a task without one.

    Raises BaseModelError where transformers has no such head for the base's family.
    """
    if form.task not in HEADED_TASKS:
        return None
    raise NotImplementedError
