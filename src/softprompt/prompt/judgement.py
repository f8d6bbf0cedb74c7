"""Whether a prompt helps: it and the bare base on the same rows that training never saw, in plain words.

`evaluation.judge` makes the figures once, at the end of a training. The run, the prompt's record, its card, `compare`
and the server repeat them, so a judgement is read again from JSON, which may be a stranger's: it consists of numbers
and of one name from a fixed list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from softprompt.prompt.calibration import Calibration

Conclusion = Literal["helps", "undecided", "does not help"]
Recommendation = Literal["prompt", "bare base"]
Rival = Literal["bare base", "commonest label", "whole context"]

MEASURES: Mapping[str, str] = {  # and how a sentence names each
    "accuracy": "", "exact_match": "", "f1_macro": "macro F1", "f1": "F1", "rouge_l": "ROUGE-L", "chrf": "chrF",
    "entity_f1": "entity F1", "accuracy_at_1": "",
}  # fmt: skip
RIVALS: Mapping[str, str] = {  # what the prompt is beside, and how a sentence names it
    "bare base": "the bare base", "commonest label": "the commonest label, always given,",
    "whole context": "the whole context, always given,",
}  # fmt: skip
_LEAST_PROBABILITY = 0.05  # of a difference by chance: a two-sided test at 95 %
_FEW_ROWS = 1_000  # to train on; more of them is the first thing to try
_AT_CHANCE = 0.05  # above the share of the commonest label
_MOST_ROWS, _MOST_TRAIN_ROWS = 1_000, 10**12  # in a record


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Scores are means over the rows, from 0 to 1, higher is better; an accuracy or exact match is the share right."""

    measure: str  # one of MEASURES: labels by their likelihood, or a score of greedy answers
    rows: int
    train_rows: int
    prompt: float
    bare_base: float  # with the same template; or, where the base has no head of its own, the rival's
    better_rows: int  # that the prompt does better than the bare base
    worse_rows: int
    difference: tuple[float, float] | None = None  # the mean difference at 95 %, where scores lie between 0 and 1
    majority: float | None = None  # always answering the rows' commonest label would be right in this share
    is_constant: bool = False  # the prompt gives all rows one label, and they have several
    has_template: bool = True
    calibration: Calibration | None = None  # of the confidence in a label
    rival: Rival = "bare base"

    @property
    def conclusion(self) -> Conclusion:
        """Whether the prompt is better, and beyond chance.

        By an exact sign test (McNemar) on rows that are right or wrong, else by the interval of the difference.
        """
        if self.prompt <= self.bare_base or self.is_constant:
            return "does not help"
        is_above_majority = self.majority is None or self.prompt > self.majority
        return "helps" if self._is_beyond_chance() and is_above_majority else "undecided"

    @property
    def recommendation(self) -> Recommendation:
        """The prompt where it is shown to help."""
        return "prompt" if self.conclusion == "helps" else "bare base"

    @property
    def text(self) -> str:
        """Both figures and what to do, in one sentence."""
        return f"{self._figures()}: {self._advice()}"

    def to_json(self) -> dict[str, Any]:
        """For `from_json`, with what follows from it for other readers."""
        concluded = {"conclusion": self.conclusion, "recommendation": self.recommendation, "text": self.text}
        calibration = {} if self.calibration is None else {"calibration": self.calibration.to_json()}
        figures = {name: value for name, value in asdict(self).items() if name != "calibration"}
        difference = list(self.difference) if self.difference else None
        return {**figures, "difference": difference, **calibration, **concluded}

    @classmethod
    def from_json(cls, record: Any) -> Judgement | None:  # Any: whatever JSON holds
        """None for a record that holds no judgement, as those of earlier releases."""
        try:
            found = cls(
                measure=str(record["measure"]), rows=int(record["rows"]), train_rows=int(record["train_rows"]),
                prompt=float(record["prompt"]), bare_base=float(record["bare_base"]),
                better_rows=int(record["better_rows"]), worse_rows=int(record["worse_rows"]),
                difference=_pair(record["difference"]), is_constant=bool(record["is_constant"]),
                has_template=bool(record["has_template"]),
                majority=None if record["majority"] is None else float(record["majority"]),
                calibration=Calibration.from_json(record.get("calibration")),
                rival=record.get("rival", "bare base"),
            )  # fmt: skip
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            return None
        return found if found._is_sound() else None

    def _is_sound(self) -> bool:
        shares = (self.prompt, self.bare_base, self.majority or 0.0)
        are_counts = 1 <= self.rows <= _MOST_ROWS and 0 <= self.train_rows <= _MOST_TRAIN_ROWS
        is_split = min(self.better_rows, self.worse_rows) >= 0 and self.better_rows + self.worse_rows <= self.rows
        is_known = self.measure in MEASURES and self.rival in RIVALS
        return is_known and are_counts and is_split and all(0 <= share <= 1 for share in shares)

    def _is_beyond_chance(self) -> bool:
        if self.difference is not None:
            return self.difference[0] > 0
        return sign_test(self.better_rows, self.worse_rows) < _LEAST_PROBABILITY

    def _figures(self) -> str:
        name, rows = MEASURES[self.measure], f"On {self.rows:,} validation rows"
        has_template = self.has_template and self.rival == "bare base"
        base = RIVALS[self.rival] + (" with the same template" if has_template else "")
        if name:
            return f"{rows} the prompt scores {self.prompt:.2f} ({name}) and {base} {self.bare_base:.2f}"
        right, bare = (round(share * self.rows) for share in (self.prompt, self.bare_base))
        return f"{rows} the prompt is right in {right:,} and {base} in {bare:,}"

    def _advice(self) -> str:
        if self.conclusion == "helps":
            return "use the prompt"
        if self.conclusion == "undecided":
            return self._doubt()
        if self.is_constant and self.prompt > self.bare_base:
            return f"use neither, for the prompt gives every row the same answer; try {_listed(self._to_try())}"
        if self.rival != "bare base":
            return f"use neither, or try {_listed(self._to_try())}"
        if self.bare_base == 1.0:
            return "use the base without a prompt, which leaves nothing to gain"
        return f"use the base without a prompt, or try {_listed(self._to_try())}"

    def _doubt(self) -> str:
        if self.majority is not None and self.prompt <= self.majority:
            always = f"always giving the commonest answer would be right in {round(self.majority * self.rows):,}"
            return f"better, but {always}; use neither, or try {_listed(self._to_try())}"
        until = "use the base without a prompt until more rows show a difference"
        if self.rival != "bare base":
            until = "do not rely on it until more rows show a difference"
        return f"better, but that may be chance; {until}: softprompt compare --data with rows that training never saw"

    def _to_try(self) -> list[str]:
        """From the likeliest to help: a bare base that guesses may not know the task at all."""
        more = [f"more rows ({self.train_rows:,} were trained on)"] if self.train_rows < _FEW_ROWS else []
        chance = self.majority is not None and self.bare_base <= self.majority + _AT_CHANCE
        if self.rival != "bare base":
            return [*more, "another learning rate", "a bigger base"]
        return [*more, "another template", "a bigger base" if chance else "another learning rate"]


def sign_test(better: int, worse: int) -> float:
    """The probability, two-sided and exact, of so uneven a split of rows where better and worse are equally likely."""
    total, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**total)))


def _pair(value: Any) -> tuple[float, float] | None:  # Any: as above
    if value is None:
        return None
    low, high = (float(bound) for bound in value)
    return low, high


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
