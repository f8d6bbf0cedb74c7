"""The training loop: a generator of bounded slices that train one or many soft prompts over one frozen base.

All prompts take their steps together: one forward and backward pass over the rows of all of them, in which no row sees
another's prompt. The loop is handed everything (base, forward, trials, ranks, clock) and asks the environment nothing.
Between two slices anything else may run on the same base. It knows neither disk nor terminal: it yields events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.splice import Row
from softprompt.training.events import Dropped, Event, ResumePoint, SliceDone, StepDone
from softprompt.training.halving import losers
from softprompt.training.plan import with_micro_batch_rows
from softprompt.training.ranks import Alone, Ranks, most_shared, share
from softprompt.training.state import RunState, within
from softprompt.training.step import accumulate_gradient, num_targets
from softprompt.training.trial import Trial
from softprompt.training.validation import validation_slices


@dataclass
class TrainingLoop:
    """Trials in training. `events()` may be driven by anyone, one `next` at a time."""

    base: Base
    forward: Forward
    trials: Sequence[Trial]
    micro_batch_rows: int
    identity: str  # of what is trained on what: a saved state belongs to one identity
    clock: Callable[[], float]
    checkpoint_layers: bool = False
    halving: bool = False  # drop the weaker half of each group of rivals as training goes on
    ranks: Ranks = field(default_factory=Alone)
    step: int = field(default=0, init=False)

    def events(self) -> Iterator[Event]:
        """Run until every trial is at its end, has not improved for its `patience`, or was dropped."""
        while running := [trial for trial in self.trials if not trial.is_over]:
            yield from self._step(running)
            due = [trial for trial in running if trial.validation_is_due and not trial.is_diverged]
            yield from self._validate(due)
            if due:
                yield from self._drop()
            if any(trial.saving_is_due for trial in running):
                yield ResumePoint(
                    step=self.step,
                    state=self.state(),
                    prompts={trial.name: trial.snapshot() for trial in self.trials},
                )

    def state(self) -> RunState:
        """All that `restore` needs, between two steps."""
        facts = {"micro_batch_rows": self.micro_batch_rows, "trials": [trial.facts() for trial in self.trials]}
        tensors = {
            f"{index}/{name}": tensor
            for index, trial in enumerate(self.trials)
            for name, tensor in trial.tensors().items()
        }
        return RunState(self.step, self.identity, facts, tensors)

    def restore(self, state: RunState) -> None:
        """Go on from a state of the same run. The splits of a step come along, so that its sums are the same bits."""
        self.step = state.step
        self._split(min(state.facts["micro_batch_rows"], self.micro_batch_rows))
        for index, (trial, facts) in enumerate(zip(self.trials, state.facts["trials"], strict=True)):
            trial.restore(facts, within(f"{index}/", state.tensors))

    def _step(self, running: Sequence[Trial]) -> Iterator[Event]:
        began = self.clock()
        chosen = [trial.next_rows() for trial in running]
        rows = [replace(row, prompt=index) for index, (some, _) in enumerate(chosen) for row in some]
        num_tokens = sum(len(row.ids) for row in rows)
        prompts = [trial.prompt().requires_grad_(True) for trial in running]
        nats_K = torch.zeros(len(running), dtype=torch.float64, device=self.base.device)
        for nats_so_far in self._gradient(prompts, rows):
            nats_K = nats_so_far
            yield SliceDone(step=self.step, num_tokens=num_tokens)
        gradients = [torch.zeros_like(prompt) if prompt.grad is None else prompt.grad for prompt in prompts]
        self.ranks.sum([nats_K, *gradients])
        rates = [trial.learning_rate for trial in running]
        norms = [trial.update(gradient) for trial, gradient in zip(running, gradients, strict=True)]
        losses, norms_K = torch.stack([nats_K, torch.stack(norms).to(nats_K)]).tolist()  # the one wait for the device
        self.step += 1
        seconds = self.clock() - began
        for trial, (some, epoch), nats, norm, rate in zip(running, chosen, losses, norms_K, rates, strict=True):
            counted = sum(num_targets(row) for row in some)
            trial.losses.append(nats / counted)
            trial.check_diverged(nats, norm)
            yield StepDone(
                step=trial.step, epoch=epoch, loss=nats / counted, learning_rate=rate, grad_norm=norm,
                num_rows=len(some), num_tokens=sum(len(row.ids) for row in some), num_targets=counted,
                seconds=seconds, candidate=trial.name,
            )  # fmt: skip

    def _gradient(self, prompts: Sequence[Tensor], rows: Sequence[Row]) -> Iterator[Tensor]:
        """The step's gradient, yielding each prompt's nats so far; where CUDA runs out of memory, again in halves."""
        mine = share(range(len(rows)), [len(row.ids) for row in rows], self.ranks)
        while True:
            for prompt in prompts:
                prompt.grad = None
            try:
                yield from accumulate(
                    accumulate_gradient(
                        self.base,
                        self.forward,
                        prompts,
                        rows,
                        self.micro_batch_rows,
                        self.checkpoint_layers,
                        mine,
                        self._least_batches(len(rows)),
                    )
                )
                return
            except torch.OutOfMemoryError:
                if self.micro_batch_rows == 1 or self.ranks.in_step:  # in step, the others wait in this very forward
                    raise
                self._split(self.micro_batch_rows // 2)

    def _least_batches(self, num_rows: int) -> int:
        if not self.ranks.in_step:
            return 0
        return math.ceil(most_shared(num_rows, self.ranks) / self.micro_batch_rows)

    def _split(self, rows: int) -> None:
        self.micro_batch_rows = rows
        for trial in self.trials:
            trial.plan = with_micro_batch_rows(trial.plan, rows)

    def _validate(self, due: Sequence[Trial]) -> Iterator[Event]:
        sums = torch.zeros(len(due), 2, dtype=torch.float64, device=self.base.device)  # nats and tokens
        for piece in validation_slices(self.base, self.forward, due, self.ranks):
            sums += piece.sums_K2
            yield SliceDone(step=self.step, num_tokens=piece.num_tokens)
        self.ranks.sum([sums])
        for trial, (nats, tokens) in zip(due, sums.tolist(), strict=True):
            yield trial.remember(nats / max(tokens, 1.0) if trial.validation else None)

    def _drop(self) -> Iterator[Event]:
        for trial in losers(self.trials) if self.halving else ():
            trial.is_dropped = True
            assert trial.name is not None
            yield Dropped(step=self.step, candidate=trial.name)
