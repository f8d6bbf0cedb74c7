"""What a training run tells its caller, slice by slice. Plain values; a prompt in them is a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from softprompt.prompt import SoftPrompt
from softprompt.training.state import RunState
from softprompt.types import brief_repr


@dataclass(frozen=True, kw_only=True)
class SliceDone:
    """A bounded piece of work that ended nothing: a micro-batch, or a batch of a validation."""

    step: int
    num_tokens: int  # real tokens of the whole step or batch, virtual ones not counted


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimiser step of one prompt."""

    step: int  # counted from 1
    epoch: float
    loss: float  # nats per counted target, over the whole step
    learning_rate: float
    grad_norm: float  # before clipping
    num_rows: int
    num_tokens: int
    num_targets: int
    seconds: float  # of the step, which all prompts in training take together
    candidate: str | None = None  # None where one prompt trains alone

    def to_json(self) -> dict[str, Any]:
        return {"kind": "step", **_named(asdict(self))}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A prompt after an epoch or a validation."""

    __repr__ = brief_repr

    step: int
    prompt: SoftPrompt
    validation_loss: float | None  # nats per text token; None without validation rows
    is_best: bool  # by the validation; without one, the latest is
    score: float | None = None  # what the caller's score gives, higher is better; None where the loss decides
    candidate: str | None = None

    def to_json(self) -> dict[str, Any]:
        line = {"kind": "checkpoint", "step": self.step, "validation_loss": self.validation_loss, "best": self.is_best}
        return _named({**line, "candidate": self.candidate} | ({} if self.score is None else {"score": self.score}))


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A candidate that trains no further: its rivals validate better."""

    step: int
    candidate: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": "dropped", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """All that a run needs to go on from here as if it had never stopped."""

    __repr__ = brief_repr

    step: int
    state: RunState
    prompts: Mapping[str | None, SoftPrompt]  # of each candidate, as it stands


Event = SliceDone | StepDone | Checkpoint | Dropped | ResumePoint


def _named(line: dict[str, Any]) -> dict[str, Any]:
    """Without the candidate where there is but one prompt."""
    return {key: value for key, value in line.items() if key != "candidate" or value is not None}
