"""A run of one prompt, made ready and not begun."""

from __future__ import annotations

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.training import Candidate, Data, Prepared, prepare


def ready_run(base: Base, data: Data, config: TrainConfig, **more: object) -> Prepared:
    """`prepare` for one candidate; `more` are its other fields."""
    return prepare(base, [Candidate(data=data, config=config, **more)])
