"""The training loop: a generator of bounded slices over one frozen base.

The loop is handed everything (base, forward, plan, rows, clock) and asks the environment nothing. Between two slices
anything else may run on the same base. It knows neither disk nor terminal: it yields events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from transformers import get_scheduler

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import RowScore, score_examples
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row
from softprompt.training.events import Checkpoint, Event, SliceDone, StepDone
from softprompt.training.plan import Plan, with_micro_batch_rows
from softprompt.training.step import accumulate_gradient, num_targets
from softprompt.types import Example, PromptRecord

_VALIDATION_ROWS_PER_SLICE = 16
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class TrainingLoop:
    """One soft prompt in training. `events()` may be driven by anyone, one `next` at a time."""

    base: Base
    forward: Forward
    plan: Plan
    examples: Sequence[Example]
    validation: Sequence[Example]
    start: Tensor  # [P, H]
    record: PromptRecord
    clock: Callable[[], float]
    step: int = field(default=0, init=False)
    best_loss: float = field(default=math.inf, init=False)
    best: SoftPrompt | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        config = self.plan.config
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        self.prompt = self.start.detach().clone().to(self.base.device, dtype).requires_grad_(True)
        self._optimizer = torch.optim.AdamW([self.prompt], lr=self.plan.learning_rate, weight_decay=config.weight_decay)
        self._schedule = get_scheduler(
            _SCHEDULERS[config.schedule],
            self._optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.plan.num_steps,
        )
        self._rows = [training_row(example, config.eos_weight) for example in self.examples]
        self._validations_without_gain = 0

    def events(self) -> Iterator[Event]:
        """Run to the end, or until the validation has not improved for `patience` times."""
        for epoch, steps in enumerate(self.plan.epochs):
            for index, rows in enumerate(steps):
                yield from self._step(rows, epoch + (index + 1) / len(steps))
                if self._checkpoint_is_due(index + 1 == len(steps)):
                    yield from self._checkpoint()
                if self._is_over():
                    return

    def snapshot(self) -> SoftPrompt:
        """The prompt as it stands."""
        return SoftPrompt(self.prompt, self.record)

    def _step(self, indices: Sequence[int], epoch: float) -> Iterator[Event]:
        began = self.clock()
        rows = [self._rows[index] for index in indices]
        num_tokens = sum(len(row.ids) for row in rows)
        nats = torch.zeros(())
        for nats_so_far in self._gradient(rows):
            nats = nats_so_far
            yield SliceDone(step=self.step, num_tokens=num_tokens)
        learning_rate = float(self._schedule.get_last_lr()[0])
        loss, grad_norm = torch.stack([nats, self._update().to(nats)]).tolist()  # the step's one wait for the device
        counted = sum(num_targets(row) for row in rows)
        yield StepDone(
            step=self.step, epoch=epoch, loss=loss / counted, learning_rate=learning_rate, grad_norm=grad_norm,
            num_rows=len(rows), num_tokens=num_tokens, num_targets=counted, seconds=self.clock() - began,
        )  # fmt: skip

    def _gradient(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """The step's gradient, yielding its nats so far; where a CUDA device runs out of memory, again in halves."""
        while True:
            self._optimizer.zero_grad(set_to_none=True)
            size = self.plan.micro_batch_rows
            try:
                checkpoint = self.plan.config.checkpoint_layers
                slices = accumulate_gradient(self.base, self.forward, [self.prompt], rows, size, checkpoint)
                yield from accumulate(slices)
                return
            except torch.OutOfMemoryError:
                if self.plan.micro_batch_rows == 1:
                    raise
                self.plan = with_micro_batch_rows(self.plan, self.plan.micro_batch_rows // 2)

    def _update(self) -> Tensor:
        limit = self.plan.config.max_grad_norm
        norm: Tensor = torch.nn.utils.clip_grad_norm_([self.prompt], math.inf if limit is None else limit)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        return norm

    def _checkpoint_is_due(self, epoch_ended: bool) -> bool:
        every = self.plan.config.validate_every
        by_steps = every is not None and self.step % every == 0
        return by_steps or (epoch_ended and every is None) or self.step == self.plan.num_steps

    def _checkpoint(self) -> Iterator[Event]:
        loss = None
        if self.validation:
            scores: list[RowScore] = []
            for first in range(0, len(self.validation), _VALIDATION_ROWS_PER_SLICE):
                chosen = self.validation[first : first + _VALIDATION_ROWS_PER_SLICE]
                scores += score_examples(self.base, self.forward, chosen, self.prompt.detach())
                yield SliceDone(step=self.step, num_tokens=sum(len(example.ids) for example in chosen))
            loss = sum(score.text_nats for score in scores) / max(sum(score.num_text for score in scores), 1)
        yield self._remember(loss)

    def _remember(self, loss: float | None) -> Checkpoint:
        is_best = loss is None or loss < self.best_loss
        if is_best:
            self.best = self.snapshot()
            self.best_loss = math.inf if loss is None else loss
            self._validations_without_gain = 0
        else:
            self._validations_without_gain += 1
        return Checkpoint(step=self.step, prompt=self.snapshot(), validation_loss=loss, is_best=is_best)

    def _is_over(self) -> bool:
        patience = self.plan.config.patience
        tired = patience is not None and self._validations_without_gain >= patience
        return self.step >= self.plan.num_steps or tired


def training_row(example: Example, eos_weight: float) -> Row:
    """The example's row under prompt 0, its EOS weighing as much as `eos_weight` text tokens."""
    weights = [
        eos_weight if is_eos else float(counted)
        for counted, is_eos in zip(example.target_mask, example.eos_mask, strict=True)
    ]
    return Row(example.ids, 0, weights)
