"""What goes into a splice: rows of token ids, each naming its soft prompt or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.errors import DataError


@dataclass(frozen=True)
class Row:
    """One sequence. `prompt` is an index into the prompts of the splice, None for the bare base."""

    ids: Sequence[int]
    prompt: int | None = None
    targets: Sequence[float] | None = None  # one per id: the weight of its loss; 0 or False where none is wanted

    def __post_init__(self) -> None:
        if self.prompt is None and not self.ids:
            raise DataError("an empty text has no token to continue from on the bare base; give at least one character")
        assert self.targets is None or len(self.targets) == len(self.ids)
        assert self.prompt is not None or not self.targets or not self.targets[0], "nothing predicts a bare first token"
