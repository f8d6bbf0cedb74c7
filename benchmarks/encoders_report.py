"""The tables of `encoders.py`, from its files alone: accuracy by contender, and what ours is above each other one.

Differences are paired over the rows that are scored, a contender counting as the mean of its seeds row by row, and have
a bootstrap interval of 95 %, as in quality_report.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from encoders_cases import OURS, PEFT, PROBE
from quality_report import paired
from quality_store import Result

TARGETS = (PROBE, *PEFT)  # that ours should be above


def results(kept: Mapping[str, Any], name: str) -> dict[int, Result]:
    """By seed."""
    seeds = kept["contenders"].get(name, {}).get("seeds", {})
    return {int(seed): Result(**item) for seed, item in seeds.items()}


def points_above(kept: Mapping[str, Any], name: str, other: str) -> tuple[float, float, float] | None:
    """Points of accuracy by which a contender is above another, with the interval; over the seeds that both have."""
    found, reference = results(kept, name), results(kept, other)
    seeds = sorted(set(found) & set(reference))
    if not seeds or name == other:
        return None
    mean, low, high = paired([found[seed] for seed in seeds], [reference[seed] for seed in seeds])
    return -100 * mean, -100 * high, -100 * low


def set_table(size: int, kept: Mapping[str, Any]) -> str:
    """Markdown: one row for each contender."""
    setting = kept["setting"]
    head = (
        f"\n{size:,} training rows, {setting['num_test']} rows scored; {setting['dtype']}, {setting['processor']}, "
        f"{setting['date']}\n\n| contender | right | seeds | ours minus it, points | 95 % interval | seconds |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *(_line(kept, name) for name in kept["contenders"])])


def _line(kept: Mapping[str, Any], name: str) -> str:
    found, gap = results(kept, name), points_above(kept, OURS, name)
    seconds = statistics.mean(item.seconds for item in found.values())
    cells = [
        name.replace("|", "/"), spread(found), f"{len(found)}",
        "" if gap is None else f"{gap[0]:+.1f}", "" if gap is None else f"{gap[1]:+.1f} to {gap[2]:+.1f}",
        f"{seconds:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def spread(found: Mapping[int, Result]) -> str:
    """Mean and standard deviation of the accuracy over the seeds, in per cent."""
    values = [100 * (1 - item.mean) for item in found.values()]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f} %" if values[1:] else " %")


def summary(kept: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """As JSON: for each size the accuracies, what ours is above each target, and whether the interval is above zero."""
    return {str(size): _summary(own) for size, own in kept.items()}


def _summary(kept: Mapping[str, Any]) -> dict[str, Any]:
    accuracies = {
        name: statistics.mean(1 - item.mean for item in results(kept, name).values()) for name in kept["contenders"]
    }
    gaps = {name: gap for name in TARGETS if (gap := points_above(kept, OURS, name)) is not None}
    return {
        "accuracy": accuracies,
        "points_above": {name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in gaps.items()},
        "targets": {name: low > 0 for name, (_, low, _) in gaps.items()},
    }
