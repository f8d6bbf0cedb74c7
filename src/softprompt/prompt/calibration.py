"""How sure a prompt's labels are: probabilities by temperature, and the threshold below which an answer is unsure.

`evaluation.calibrate` fits it on validation rows at the end of a training, and the prompt's record keeps it, so it is
read again from JSON, which may be a stranger's: it consists of numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LEAST_KEPT = 10  # validation rows with a sure answer; fewer could all be right by chance
CONFIDENCE_DIGITS = 6  # of a confidence, wherever one is written or compared
_MOST_ROWS = 1_000  # in a record
_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 1e-6, 1e6


class ThresholdChoice(NamedTuple):
    """Where answers begin to be sure, and what that means for the validation rows."""

    threshold: float  # the least confidence of a sure answer
    kept: int  # validation rows with a sure answer
    right: int  # of those, with the right one


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted on validation rows, whose confidences it keeps, so that a threshold for any accuracy can be chosen."""

    temperature: float  # the scores of the labels are divided by it before the softmax
    right: tuple[float, ...]  # confidence in each answer that was right, ascending
    wrong: tuple[float, ...]  # and in each that was wrong

    @property
    def rows(self) -> int:
        return len(self.right) + len(self.wrong)

    def choose(self, target_accuracy: float) -> ThresholdChoice | None:
        """The smallest confidence at which the rows that have it or more are right in at least this share.

        None where no confidence is enough, or one that fewer than `LEAST_KEPT` rows have.
        """
        enough = (item for item in self._choices() if item.kept >= LEAST_KEPT)
        reached = (item for item in enough if item.right >= target_accuracy * item.kept)
        return next(reached, None)

    def to_json(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "right": list(self.right), "wrong": list(self.wrong)}

    @classmethod
    def from_json(cls, record: Any) -> Calibration | None:  # Any: whatever JSON holds
        """None for a record that holds no calibration."""
        try:
            right, wrong = (tuple(sorted(float(each) for each in record[name])) for name in ("right", "wrong"))
            found = cls(temperature=float(record["temperature"]), right=right, wrong=wrong)
        except (TypeError, KeyError, ValueError, OverflowError):
            return None
        return found if found._is_sound() else None

    def _choices(self) -> Iterator[ThresholdChoice]:
        """From the smallest confidence up."""
        for threshold in sorted({*self.right, *self.wrong}):
            right, wrong = (len(own) - bisect_left(own, threshold) for own in (self.right, self.wrong))
            yield ThresholdChoice(threshold, right + wrong, right)

    def _is_sound(self) -> bool:
        is_temperature = _LEAST_TEMPERATURE <= self.temperature <= _GREATEST_TEMPERATURE
        return is_temperature and 1 <= self.rows <= _MOST_ROWS and all(map(_is_share, (*self.right, *self.wrong)))


def _is_share(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1


def rounded(confidences: Sequence[float]) -> list[float]:
    """Confidences as they are written and compared."""
    return [round(float(each), CONFIDENCE_DIGITS) for each in confidences]
