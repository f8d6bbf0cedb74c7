"""What choosing remembers of one answer: its settings, its ids so far, and its guide."""

from __future__ import annotations

from dataclasses import dataclass, field

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.engine.choosing.guides import Guide
from softprompt.engine.choosing.penalties import Touched
from softprompt.engine.choosing.token_rules import RowRules


@dataclass
class ChoosingRow:
    """One answer's state; `take` is all that changes it, so one that is made again and takes the same ids goes on."""

    sampling: SamplingConfig
    text_ids: tuple[int, ...]
    seed: int  # of this answer alone
    touched: Touched
    guide: Guide | None = None
    rules: RowRules | None = None  # None where the base's generation settings have none
    new_ids: list[int] = field(default_factory=list)

    def take(self, token: int) -> None:
        """The answer goes on with this token."""
        self.new_ids.append(token)
        self.touched.take(token)
        if self.rules is not None:
            self.rules.take(token)
        if self.guide is not None:
            self.guide.take(token)

    @property
    def is_complete(self) -> bool:
        """Whether its guide is satisfied and lets nothing follow: the answer ends without a token that says so."""
        return self.guide is not None and self.guide.is_complete

    @property
    def problem(self) -> str | None:
        """Why its guide lets nothing follow; None where it does, or there is none."""
        return None if self.guide is None else self.guide.problem

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the unchanged logits is the one to choose."""
        is_bare = self.guide is None and (self.rules is None or not self.rules.matters())
        return is_bare and self.sampling.temperature == 0 and not self.is_penalised

    @property
    def is_penalised(self) -> bool:
        return self.touched.matters(len(self.new_ids))


def ending_ids(base: Base, sampling: SamplingConfig) -> tuple[int, ...]:
    """Every id that ends an answer under these settings."""
    ids = {*(() if sampling.ignore_eos else base.stop_ids), *sampling.stop_ids}
    return tuple(sorted(token for token in ids if token >= 0))
