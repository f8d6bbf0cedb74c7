"""What a training run tells its caller, slice by slice. Plain values; a prompt in them is a copy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from softprompt.prompt import SoftPrompt


@dataclass(frozen=True, kw_only=True)
class SliceDone:
    """A bounded piece of work that ended nothing: a micro-batch, or a batch of a validation."""

    step: int
    num_tokens: int  # real tokens run through the base, virtual ones not counted


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimiser step."""

    step: int  # counted from 1
    epoch: float
    loss: float  # nats per counted target, over the whole step
    learning_rate: float
    grad_norm: float  # before clipping
    num_rows: int
    num_tokens: int
    num_targets: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"kind": "step", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The prompt after an epoch or a validation."""

    step: int
    prompt: SoftPrompt
    validation_loss: float | None  # nats per text token; None without validation rows
    is_best: bool  # by the validation; without one, the latest is

    def to_json(self) -> dict[str, Any]:
        return {"kind": "checkpoint", "step": self.step, "validation_loss": self.validation_loss, "best": self.is_best}


Event = SliceDone | StepDone | Checkpoint
