"""The training loop: a generator of bounded slices that train one or many soft prompts over one frozen base.

All prompts take their steps together: one forward and backward pass over the rows of all of them, in which no row sees
another's prompt. The loop is handed everything (base, forward, trials, ranks, clock) and asks the environment nothing.
Between two slices anything else may run on the same base. It knows neither disk nor terminal: it yields events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import score_under
from softprompt.splice import Row
from softprompt.training.events import Dropped, Event, ResumePoint, RunState, SliceDone, StepDone, within
from softprompt.training.plan import with_micro_batch_rows
from softprompt.training.ranks import Alone, Ranks, most_shared, share
from softprompt.training.step import accumulate_gradient, num_targets
from softprompt.training.trial import Trial
from softprompt.types import Example


def losers(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that should train no further, by their best validations; ties go to the earlier trial."""
    groups = {trial.group: [rival for rival in trials if rival.group == trial.group] for trial in trials}
    return [trial for rivals in groups.values() for trial in _losers_of_group(rivals)]


def _losers_of_group(rivals: Sequence[Trial]) -> list[Trial]:
    left = [trial for trial in rivals if not trial.is_dropped]
    if not left:
        return []
    allowed = _allowed(len(rivals), min(_validated_progress(trial) for trial in left))
    keep = max(allowed, (len(left) + 1) // 2)  # one rung at a time, however seldom they are validated
    ranked = sorted(left, key=lambda trial: trial.best_value)
    return [trial for trial in ranked[keep:] if trial.is_judged and not trial.is_over]


def _allowed(count: int, progress: float) -> int:
    rungs = math.ceil(math.log2(count)) if count > 1 else 0
    passed = max(_rungs_passed(rungs, progress), default=0)
    return max(count >> passed, 1)


def _rungs_passed(rungs: int, progress: float) -> Iterable[int]:
    return (rung for rung in range(1, rungs + 1) if progress >= (2**rung - 1) / (2 ** (rungs + 1) - 1))


def _validated_progress(trial: Trial) -> float:
    """The share of its steps after which it was last validated; one that ended early counts as at its end."""
    if trial.is_over:
        return 1.0
    return trial.validations[-1][0] / trial.plan.num_steps if trial.validations else 0.0


_TOKENS_PER_SLICE = 2_048


@dataclass(frozen=True)
class ValidationSlice:
    """A bounded part of a validation."""

    sums_K2: Tensor  # float64: nats and tokens of each trial
    num_tokens: int


def validation_slices(base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks) -> Iterator[ValidationSlice]:
    """The trials' validation rows that are this rank's, each under its own prompt.

    Where the ranks run in step, a row at a time: as many forwards everywhere, the spare ones for nothing.
    """
    prompts = [trial.prompt() for trial in trials]
    pairs = [(example, index) for index, trial in enumerate(trials) for example in trial.validation]
    mine = share(pairs, [len(example.ids) for example, _ in pairs], ranks)
    for chosen in [[pair] for pair in mine] if ranks.in_step else _cut(mine):
        sums_K2 = torch.zeros(len(trials), 2, dtype=torch.float64)
        for (_, index), score in zip(chosen, score_under(base, forward, chosen, prompts), strict=True):
            sums_K2[index] += torch.tensor([score.text_nats, score.num_text], dtype=torch.float64)
        yield ValidationSlice(sums_K2.to(base.device), sum(len(example.ids) for example, _ in chosen))
    for _ in range(most_shared(len(pairs), ranks) - len(mine) if ranks.in_step else 0):
        score_under(base, forward, pairs[:1], prompts)


def _cut(pairs: Sequence[tuple[Example, int]]) -> list[list[tuple[Example, int]]]:
    slices: list[list[tuple[Example, int]]] = []
    room = 0
    for pair in pairs:
        if not slices or len(pair[0].ids) > room:
            slices.append([])
            room = _TOKENS_PER_SLICE
        slices[-1].append(pair)
        room -= len(pair[0].ids)
    return slices


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
