"""The state of a run between two steps: tensors and plain JSON, for whoever keeps it.

No random state is among it: the order of the rows, the start and every draw are functions of seed and step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.errors import StorageError
from softprompt.types import brief_repr

STATE_VERSION = 1


@dataclass(frozen=True)
class RunState:
    """`facts` is JSON; `tensors` are on the CPU in the dtype that they are trained in."""

    __repr__ = brief_repr

    step: int
    identity: str  # of plan, data and base: a state belongs to one run
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        return {"state_version": STATE_VERSION, "step": self.step, "identity": self.identity, "facts": self.facts}

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
