"""Which rivals train on: successive halving (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016, 1502.07943).

Rivals are trials of one group, which share their validation rows. K rivals have ceil(log2 K) rungs; at the r-th, at
most K / 2**r of them train on. Each rung is given the same number of steps in all, so it comes after (2**r - 1) /
(2**(R + 1) - 1) of the steps of a trial; a rung is decided once all that are left have been validated behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from softprompt.training.trial import Trial


def losers(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that should train no further, by their best validations; ties go to the earlier trial."""
    groups = {trial.group: [rival for rival in trials if rival.group == trial.group] for trial in trials}
    return [trial for rivals in groups.values() for trial in _losers_of_group(rivals)]


def _losers_of_group(rivals: Sequence[Trial]) -> list[Trial]:
    left = [trial for trial in rivals if not trial.is_dropped]
    if not left:
        return []
    allowed = _allowed(len(rivals), min(_validated_progress(trial) for trial in left))
    keep = max(allowed, (len(left) + 1) // 2)  # one rung at a time, however seldom they are validated
    ranked = sorted(left, key=lambda trial: trial.best_value)
    return [trial for trial in ranked[keep:] if trial.is_judged and not trial.is_over]


def _allowed(count: int, progress: float) -> int:
    rungs = math.ceil(math.log2(count)) if count > 1 else 0
    passed = max(_rungs_passed(rungs, progress), default=0)
    return max(count >> passed, 1)


def _rungs_passed(rungs: int, progress: float) -> Iterable[int]:
    return (rung for rung in range(1, rungs + 1) if progress >= (2**rung - 1) / (2 ** (rungs + 1) - 1))


def _validated_progress(trial: Trial) -> float:
    """The share of its steps after which it was last validated; one that ended early counts as at its end."""
    if trial.is_over:
        return 1.0
    return trial.validations[-1][0] / trial.plan.num_steps if trial.validations else 0.0
