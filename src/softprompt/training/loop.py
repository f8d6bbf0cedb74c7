"""The training loop: a generator of bounded slices that train one or many soft prompts over one frozen base.

All prompts take their steps together: one forward and backward pass over the rows of all of them, in which no row sees
another's prompt. The loop gets everything as arguments (base, forward, trials, ranks, clock) and reads nothing from the
environment. Between two slices anything else may run on the same base. It knows neither disk nor terminal: it yields
events.

K trials in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward
from softprompt.loss import ObjectiveWeights, score_under
from softprompt.splice import Row
from softprompt.training.events import Dropped, Event, ResumePoint, RunState, SliceDone, StepDone, within
from softprompt.training.ranks import Alone, Ranks, most_shared, share
from softprompt.training.step import accumulate_gradient, num_targets
from softprompt.training.trial import Trial
from softprompt.types import Example

_TOKENS_PER_VALIDATION_SLICE = 2_048


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
    halving: bool = False  # drop the weaker half of each group of rivals as training proceeds
    ranks: Ranks = field(default_factory=Alone)
    step: int = field(default=0, init=False)
    _validation_pending: bool = field(default=False, init=False)

    def events(self) -> Iterator[Event]:
        """Run until every trial has finished, has not improved for its `patience`, or was dropped."""
        while running := [trial for trial in self.trials if not trial.is_over]:
            yield from self._step(running)
            due = [trial for trial in running if trial.validation_is_due and not trial.is_diverged]
            yield from self._validate(due)
            if due:
                yield from self._drop()
            self._validation_pending = False
            if any(trial.saving_is_due for trial in running):
                yield self._resume_point()

    def resume_point(self) -> ResumePoint | None:
        """The state between two slices, for whoever has to stop here; None while the last step's validation is pending.

        In the middle of a step it is the state before that step.
        """
        return None if self._validation_pending else self._resume_point()

    def _resume_point(self) -> ResumePoint:
        prompts = {trial.name: trial.snapshot() for trial in self.trials}
        return ResumePoint(step=self.step, state=self._state(), prompts=prompts)

    def _state(self) -> RunState:
        metadata = {
            "micro_batch_rows": self.micro_batch_rows,
            "kernels": self.trials[0].plan.kernels,
            "trials": [trial.state() for trial in self.trials],
        }
        tensors = {
            f"{index}/{name}": tensor
            for index, trial in enumerate(self.trials)
            for name, tensor in trial.tensors().items()
        }
        return RunState(self.step, self.identity, metadata, tensors)

    def restore(self, state: RunState) -> None:
        """Continue from a state of the same run, with its split of the steps, so that the sums are the same bits."""
        self.step = state.step
        self._split(min(state.metadata["micro_batch_rows"], self.micro_batch_rows))
        for index, (trial, own) in enumerate(zip(self.trials, state.metadata["trials"], strict=True)):
            trial.restore(own, within(f"{index}/", state.tensors))

    def _step(self, running: Sequence[Trial]) -> Iterator[Event]:
        began = self.clock()
        chosen = [trial.next_rows() for trial in running]
        rows = [replace(row, prompt=index) for index, (some, _) in enumerate(chosen) for row in some]
        num_tokens = sum(row.num_tokens for row in rows)
        prompts = [trial.prompt().requires_grad_(True) for trial in running]
        heads = [trial.head() for trial in running]
        nats_K = torch.zeros(len(running), dtype=torch.float64, device=self.base.device)
        for nats_so_far in self._gradient(prompts, rows, heads):
            nats_K = nats_so_far
            yield SliceDone(step=self.step, num_tokens=num_tokens)
        gradients = [_gradient_of(prompt) for prompt in prompts]
        of_heads = [{name: _gradient_of(weight) for name, weight in _weights(head).items()} for head in heads]
        self.ranks.sum([nats_K, *gradients, *(gradient for own in of_heads for gradient in own.values())])
        rates = [trial.learning_rate for trial in running]
        norms = [trial.update(own, head) for trial, own, head in zip(running, gradients, of_heads, strict=True)]
        losses, norms_K = torch.stack([nats_K, torch.stack(norms).to(nats_K)]).tolist()  # the one device sync
        self.step += 1
        seconds = self.clock() - began
        events = []
        for trial, (some, epoch), nats, norm, rate in zip(running, chosen, losses, norms_K, rates, strict=True):
            counted = sum(num_targets(row) for row in some)
            trial.losses.append(nats / counted)
            trial.check_diverged(nats, norm)
            events.append(
                StepDone(
                    step=trial.step, epoch=epoch, loss=nats / counted, learning_rate=rate, grad_norm=norm,
                    num_rows=len(some), num_tokens=sum(row.num_tokens for row in some), num_targets=counted,
                    seconds=seconds, candidate=trial.name,
                )
            )  # fmt: skip
        self._validation_pending = any(trial.saving_is_due for trial in running)
        yield from events

    def _gradient(
        self, prompts: Sequence[Tensor], rows: Sequence[Row], heads: Sequence[ObjectiveWeights | None]
    ) -> Iterator[Tensor]:
        """The step's gradient, yielding each prompt's nats so far; if CUDA runs out of memory, again in halves."""
        mine = share(range(len(rows)), [row.num_tokens for row in rows], self.ranks)
        while True:
            for leaf in (*prompts, *(weight for head in heads for weight in _weights(head).values())):
                leaf.grad = None
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
                        heads,
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
            trial.plan = replace(trial.plan, micro_batch_rows=rows)

    def _validate(self, due: Sequence[Trial]) -> Iterator[Event]:
        sums_K2 = torch.zeros(len(due), 2, dtype=torch.float64, device=self.base.device)  # nats and tokens
        for piece in validation_slices(self.base, self.forward, due, self.ranks):
            sums_K2 += piece.sums_K2
            yield SliceDone(step=self.step, num_tokens=piece.num_tokens)
        self.ranks.sum([sums_K2])
        for trial, (nats, tokens) in zip(due, sums_K2.tolist(), strict=True):
            with self.forward.head.kernels.active():  # a score runs the base too
                event = trial.record_validation(nats / max(tokens, 1.0) if trial.validation else None)
            yield event

    def _drop(self) -> Iterator[Event]:
        for trial in losers(self.trials) if self.halving else ():
            trial.is_dropped = True
            assert trial.name is not None
            yield Dropped(step=self.step, candidate=trial.name)


def _weights(head: ObjectiveWeights | None) -> Mapping[str, Tensor]:
    return {} if head is None else head.weights


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@dataclass(frozen=True)
class ValidationSlice:
    """A bounded part of a validation."""

    sums_K2: Tensor  # float64: nats and tokens of each trial
    num_tokens: int


def validation_slices(base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks) -> Iterator[ValidationSlice]:
    """This rank's share of the trials' validation rows, each row under its own prompt.

    Ranks in step run one row at a time, and idle forwards at the end, so that all of them run as many.
    """
    prompts = [trial.averaged() for trial in trials]
    heads = [trial.averaged_head() for trial in trials]
    pairs = [(example, index) for index, trial in enumerate(trials) for example in trial.validation]
    mine = share(pairs, [_num_tokens(example) for example, _ in pairs], ranks)
    for chosen in [[pair] for pair in mine] if ranks.in_step else _slices(mine, trials, heads):
        sums_K2 = torch.zeros(len(trials), 2, dtype=torch.float64)
        for (_, index), score in zip(chosen, score_under(base, forward, chosen, prompts, heads), strict=True):
            sums_K2[index] += torch.tensor([score.text_nats, score.num_text], dtype=torch.float64)
        yield ValidationSlice(sums_K2.to(base.device), sum(_num_tokens(example) for example, _ in chosen))
    for _ in range(most_shared(len(pairs), ranks) - len(mine) if ranks.in_step else 0):
        score_under(base, forward, pairs[:1], prompts, heads)


def _num_tokens(example: Example) -> int:
    return len(example.ids) + len(example.source) + sum(map(len, example.others))


def _slices(
    pairs: Sequence[tuple[Example, int]], trials: Sequence[Trial], heads: Sequence[ObjectiveWeights | None]
) -> list[list[tuple[Example, int]]]:
    """Rows whose losses depend on each other in batches as of a training step, each of one trial, in order."""
    joint = [index for index, head in enumerate(heads) if head is not None and head.objective.is_joint]
    slices = _cut([pair for pair in pairs if pair[1] not in joint])
    for index in joint:
        own, size = [pair for pair in pairs if pair[1] == index], trials[index].plan.config.batch_rows
        slices += [own[first : first + size] for first in range(0, len(own), size)]
    return slices


def _cut(pairs: Sequence[tuple[Example, int]]) -> list[list[tuple[Example, int]]]:
    slices: list[list[tuple[Example, int]]] = []
    num_left = 0  # tokens that the last slice still takes
    for pair in pairs:
        if not slices or _num_tokens(pair[0]) > num_left:
            slices.append([])
            num_left = _TOKENS_PER_VALIDATION_SLICE
        slices[-1].append(pair)
        num_left -= _num_tokens(pair[0])
    return slices


# Successive halving (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016, 1502.07943). Rivals are trials of one
# group, which share their validation rows. K rivals have ceil(log2 K) rungs; at the r-th, at most K / 2**r of them
# train on. Each rung is given the same number of steps in all, so it comes after (2**r - 1) / (2**(R + 1) - 1) of the
# steps of a trial; a rung is decided once all remaining rivals have been validated after it.


def losers(trials: Sequence[Trial]) -> list[Trial]:
    """The trials to drop now, by their best validations; ties go to the earlier trial."""
    groups = {trial.group: [rival for rival in trials if rival.group == trial.group] for trial in trials}
    return [trial for rivals in groups.values() for trial in _losers_of_group(rivals)]


def _losers_of_group(rivals: Sequence[Trial]) -> list[Trial]:
    left = [trial for trial in rivals if not trial.is_dropped]
    if not left:
        return []
    allowed = _num_allowed(len(rivals), min(_validated_progress(trial) for trial in left))
    keep = max(allowed, (len(left) + 1) // 2)  # one rung at a time, however seldom they are validated
    ranked = sorted(left, key=lambda trial: trial.best_value)
    return [trial for trial in ranked[keep:] if trial.can_be_ranked and not trial.is_over]


def _num_allowed(count: int, progress: float) -> int:
    rungs = math.ceil(math.log2(count)) if count > 1 else 0
    passed = [rung for rung in range(1, rungs + 1) if progress >= (2**rung - 1) / (2 ** (rungs + 1) - 1)]
    return max(count >> max(passed, default=0), 1)


def _validated_progress(trial: Trial) -> float:
    """The share of its steps after which it was last validated; a trial that ended early counts as 1."""
    if trial.is_over:
        return 1.0
    return trial.validations[-1][0] / trial.plan.num_steps if trial.validations else 0.0
