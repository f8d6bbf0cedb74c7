"""Train soft prompts on a frozen base: resolve the plans, run the loop, give back each prompt with its record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.errors import ConfigError, DivergedError
from softprompt.prompt import SoftPrompt, drift
from softprompt.settings import check_kinds
from softprompt.training.events import Event
from softprompt.training.plan import Plan
from softprompt.training.prepare import Candidate, Data, Prepared, prepare
from softprompt.training.ranks import Ranks
from softprompt.training.state import RunState
from softprompt.training.trial import Score, Trial
from softprompt.types import brief_repr

Sink = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished (or interrupted) run of one prompt."""

    __repr__ = brief_repr

    prompt: SoftPrompt  # the best by validation; without validation, the last
    plan: Plan
    losses: tuple[float, ...]  # nats per counted target, one per step
    validation_losses: tuple[tuple[int, float], ...]  # (step, nats per text token)
    kept_step: int  # the step that `prompt` is from
    interrupted: bool  # stopped by KeyboardInterrupt
    notes: tuple[str, ...]  # what the user should know about how the rows were read and `auto` was resolved
    name: str | None = None  # of the candidate
    scores: tuple[tuple[int, float], ...] = ()  # (step, what the caller's score gave)
    dropped_after: int | None = None  # the step after which its rivals trained on without it
    diverged_after: int | None = None  # the step after which its loss or prompt was no longer a number

    @property
    def diverged_words(self) -> str:
        """What happened, and what to do."""
        rate = self.plan.learning_rate
        return f"training diverged after step {self.diverged_after}: lower the learning rate ({rate:.3g})"

    @property
    def value(self) -> float:
        """What candidates are ranked by, lower for better: the best validation's loss, or its score turned round."""
        values = [-score for _, score in self.scores] or [loss for _, loss in self.validation_losses]
        return min((value for value in values if not math.isnan(value)), default=math.inf)


def train(
    base: Base,
    data: Data,
    config: TrainConfig | None = None,
    *,
    validation: Data | None = None,
    start: SoftPrompt | None = None,
    score: Score | None = None,
    sink: Sink | None = None,
    prepared: Callable[[Prepared], None] | None = None,
    ranks: Ranks | None = None,
    resume: RunState | None = None,
) -> TrainResult:
    """Train a soft prompt [P, H] on rows, texts or ready examples, from `start` if given; `sink` hears every event.

    `score` rates a prompt, higher for better, and then chooses the best checkpoint in place of the validation loss.
    `prepared` is called once with the resolved plan and what was read, before the first step. `resume` goes on from the
    state of a ResumePoint event of the same run. A KeyboardInterrupt ends the run early and keeps the best prompt so
    far. The base is not changed by a bit.

    Raises DataError for rows that cannot be used, LengthError where the prompt leaves no room for text, PromptError
    where `start` has another width, StorageError where `resume` is of another run, and MemoryLimitError where one row
    does not fit, and DivergedError where the loss stops being a number before there is a prompt to keep.
    """
    check_kinds(base=(base, Base), config=(config, TrainConfig), start=(start, SoftPrompt))
    only = Candidate(data=data, config=config or TrainConfig(), validation=validation, start=start, score=score)
    return train_together(base, [only], sink=sink, prepared=prepared, ranks=ranks, resume=resume)[0]


def train_together(
    base: Base,
    candidates: Sequence[Candidate],
    *,
    halving: bool = False,
    sink: Sink | None = None,
    prepared: Callable[[Prepared], None] | None = None,
    ranks: Ranks | None = None,
    resume: RunState | None = None,
) -> tuple[TrainResult, ...]:
    """Train several soft prompts at once, one forward and backward pass per step over the rows of all of them.

    Each has its own rows, settings, optimiser, schedule, patience and best checkpoint, and becomes what it would have
    become alone, to rounding. With `halving`, the weaker half of each group stops early, again and again (successive
    halving, Jamieson and Talwalkar 2016). Results are in the order of the candidates. The rest, and what is raised, is
    as with `train`.
    """
    _check_names(candidates)
    began = time.perf_counter()
    ready = prepare(base, candidates, halving=halving, ranks=ranks, resume=resume)
    if prepared is not None:
        prepared(ready)
    interrupted = False
    try:
        for event in ready.loop.events():
            if sink is not None:
                sink(event)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - began
    results = tuple(_result(ready, trial, interrupted, seconds) for trial in ready.loop.trials)
    if all(trial.is_diverged and trial.best is None for trial in ready.loop.trials):
        raise DivergedError(f"{results[0].diverged_words}, and train anew")
    return results


def _check_names(candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise ConfigError("there is no candidate to train; give at least one")
    names = [candidate.name for candidate in candidates]
    if len(candidates) > 1 and (None in names or len(set(names)) < len(names)):
        raise ConfigError(f"candidates that train together need a name each, no two alike; these have {names}")


def _result(ready: Prepared, trial: Trial, interrupted: bool, seconds: float) -> TrainResult:
    kept, kept_step = _kept(trial, interrupted)
    losses = tuple(trial.losses)
    validated = tuple((step, loss) for step, loss, _ in trial.validations if loss is not None)
    scores = tuple((step, score) for step, _, score in trial.validations if score is not None)
    outcome: dict[str, Any] = {
        "steps": trial.step, "kept_step": kept_step, "interrupted": interrupted, "losses": losses,
        "validation_losses": validated, "seconds": round(seconds, 3), "plan": trial.plan.to_json(),
    }  # fmt: skip
    outcome["drift"] = [token.to_json() for token in drift(trial.start, kept)]
    if scores:
        outcome["scores"] = scores
    record = replace(kept.record, run={**kept.record.run, **outcome})
    return TrainResult(
        prompt=SoftPrompt(kept.tensor, record), plan=trial.plan, losses=losses, validation_losses=validated,
        kept_step=kept_step, interrupted=interrupted, notes=ready.notes, name=trial.name, scores=scores,
        dropped_after=trial.step if trial.is_dropped else None,
        diverged_after=trial.step if trial.is_diverged else None,
    )  # fmt: skip


def _kept(trial: Trial, interrupted: bool) -> tuple[SoftPrompt, int]:
    if trial.best is not None and (trial.validation or trial.is_diverged or not interrupted):
        return trial.best, trial.best_step
    return trial.snapshot(), trial.step
