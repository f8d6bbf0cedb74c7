"""The events that a training run yields, slice by slice, and the state that it resumes from.

Plain values; a prompt in them is a copy. No random state is in a `RunState`: the order of the rows, the start and every
draw are functions of seed and step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from softprompt.errors import StorageError
from softprompt.prompt import SoftPrompt
from softprompt.types import brief_repr

STATE_VERSION = 1


@dataclass(frozen=True)
class RunState:
    """A run between two steps. `metadata` is JSON; `tensors` are on the CPU, in the dtype that they are trained in."""

    __repr__ = brief_repr

    step: int
    identity: str  # of plan, data and base: a state belongs to one run
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        head = {"state_version": STATE_VERSION, "step": self.step, "identity": self.identity}
        return {**head, "facts": self.metadata}  # the key of the file format

    @classmethod
    def from_json(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RunState:
        """Raises: StorageError for a record of another release or none."""
        if record.get("state_version") != STATE_VERSION:
            raise StorageError(
                f"the checkpoint has the state_version {record.get('state_version')!r}; this release resumes from "
                f"{STATE_VERSION}: resume with the release that wrote it, or train further with --init-from"
            )
        try:
            return cls(int(record["step"]), str(record["identity"]), dict(record["facts"]), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"the checkpoint's state is malformed ({error!r}); delete it to use the one before"
            ) from error


def within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class SliceDone:
    """A bounded piece of work that completed no step: a micro-batch, or a batch of a validation."""

    step: int
    num_tokens: int  # real tokens of the whole step or batch, virtual ones not counted


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimiser step of one prompt."""

    step: int  # counted from 1
    epoch: float
    loss: float  # nats per target, over the whole step; with a loss among the labels each row is one target
    learning_rate: float
    grad_norm: float  # before clipping
    num_rows: int
    num_tokens: int
    num_targets: int  # that `loss` is the mean over
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
    score: float | None = None  # by the caller's score, higher is better; None where the loss decides
    candidate: str | None = None

    def to_json(self) -> dict[str, Any]:
        line = {"kind": "checkpoint", "step": self.step, "validation_loss": self.validation_loss, "best": self.is_best}
        return _named({**line, "candidate": self.candidate} | ({} if self.score is None else {"score": self.score}))


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A candidate whose training ends early, because its rivals validate better."""

    step: int
    candidate: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": "dropped", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """All that a run needs to resume from here as if it had never stopped."""

    __repr__ = brief_repr

    step: int
    state: RunState
    prompts: Mapping[str | None, SoftPrompt]  # of each candidate, at this step


Event = SliceDone | StepDone | Checkpoint | Dropped | ResumePoint


def _named(line: dict[str, Any]) -> dict[str, Any]:
    """Without the candidate where there is but one prompt."""
    return {key: value for key, value in line.items() if key != "candidate" or value is not None}
