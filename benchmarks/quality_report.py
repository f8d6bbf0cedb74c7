"""The tables of the bench of a real base, from its files alone: one per set, and one row per set for all of them.

Differences are paired over the test rows and have a bootstrap interval of 95 %, as `compare` has them; a contender with
several seeds counts as the mean of them, row by row.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality_store import (
    BARE,
    BEST,
    GRID,
    IN_CONTEXT,
    INSTRUCTION,
    NOTEBOOK,
    OURS,
    PROBE,
    RANDOM,
    WORDS,
    Result,
)

from softprompt.evaluation.heldout import bootstrap_interval

ORDER = (BARE, INSTRUCTION, IN_CONTEXT, WORDS, PROBE, NOTEBOOK, BEST, OURS, RANDOM)  # then those of --recipe
LENGTH = 20
LARGEST_SPREAD = {"labels": 2.0, "texts": 0.02}  # points; share of the loss
WAY = 0.9  # from the bare base to the grid's best, on texts
LEARNT_POINTS = 3.0  # above the written template, with a thousand labelled rows

Gap = tuple[float, float, float]  # of the mean, and its interval


class SetResults:
    """One set's file."""

    def __init__(self, name: str, kept: Mapping[str, Any]) -> None:
        self.name, self.setting = name, kept["setting"]
        self._contenders = kept["contenders"]
        self.has_labels = bool(self.setting["labels"])
        self.names = [name for name in sorted(self._contenders, key=_place) if not name.startswith(GRID)]
        self.form = ".1f" if self.has_labels else ".3f"
        exact = "exact answers" if self.setting["has_exact_answers"] else ""
        self.greedy_column = "greedy answer is it" if self.has_labels else exact

    def results(self, name: str) -> list[Result]:
        seeds = self._contenders.get(name, {}).get("seeds", {})
        return [Result(**seeds[seed]) for seed in sorted(seeds, key=int)]

    def values(self, name: str) -> list[float]:
        """By seed: the accuracy in per cent, or nats per token."""
        return [100 * (1 - item.mean) if self.has_labels else item.mean for item in self.results(name)]

    def greedy(self, name: str) -> float | None:
        """Per cent of rows whose greedy answer is the label or the record, over all seeds."""
        found = [statistics.mean(item.greedy) for item in self.results(name) if item.greedy]
        return 100 * statistics.mean(found) if found else None

    def gap(self, name: str, reference: str) -> Gap | None:
        """A contender minus another, in points of accuracy or nats per token."""
        found, bare = self.results(name), self.results(reference)
        if not found or not bare or name == reference:
            return None
        mean, low, high = paired(found, bare)
        return (-100 * mean, -100 * high, -100 * low) if self.has_labels else (mean, low, high)

    def reference(self) -> str:
        """What a person has without training: the bare base with its best template, or with an instruction."""
        known = [name for name in (BARE, INSTRUCTION) if self.values(name)]
        return min(known, key=lambda name: self.worth(name)) if known else BARE

    def worth(self, name: str) -> float:
        """Lower is better."""
        mean = statistics.mean(self.values(name))
        return -mean if self.has_labels else mean

    def signed(self, value: float) -> str:
        return f"{round(value, int(self.form[1])) + 0.0:+{self.form}}"  # no minus before a zero

    def worse_by(self, gap: Gap) -> float:
        """How far even the favourable end of the interval is on the wrong side; at most 0 where it is not."""
        return -gap[2] if self.has_labels else gap[1]


def paired(found: Sequence[Result], reference: Sequence[Result]) -> Gap:
    """The mean over the seeds of each row minus that of a reference, and the interval over the rows."""
    means = [np.mean([item.sums for item in own], axis=0) for own in (found, reference)]
    rows, counts = means[0] - means[1], reference[0].counts
    interval = bootstrap_interval(rows.tolist(), counts, 0)
    assert interval is not None, "one test row"
    return float(rows.sum() / sum(counts)), interval.low, interval.high


def set_table(name: str, kept: Mapping[str, Any]) -> str:
    own = SetResults(name, kept)
    setting = own.setting
    columns = [
        "contender", "accuracy" if own.has_labels else "nats per token", own.greedy_column, "seeds",
        "minus the bare base", "95 % interval", "seconds",
    ]  # fmt: skip
    head = (
        f"\n{name}: {setting['num_train']} rows, {setting['num_test']} test rows; {setting['dtype']}, "
        f"{setting['processor']}, {setting['date']}\n"
    )
    lines = [_line(own, each) for each in own.names]
    return "\n".join([head, *_markdown([columns, *lines])])


def _line(own: SetResults, name: str) -> list[str]:
    found, gap, greedy = own.results(name), own.gap(name, BARE), own.greedy(name)
    notes = [found[0].note, *_recommended(found)]
    note = f" ({'; '.join(each for each in notes if each)})" if any(notes) else ""
    return [
        f"{name}{note}", _spread(own, name), "" if greedy is None else f"{greedy:.1f} %", str(len(found)),
        "" if gap is None else own.signed(gap[0]),
        "" if gap is None else f"{own.signed(gap[1])} to {own.signed(gap[2])}",
        f"{statistics.mean(item.seconds for item in found):.0f}",
    ]  # fmt: skip


def _recommended(found: Sequence[Result]) -> list[str]:
    """How often the product itself, by its validation rows, says that the prompt helps."""
    said = [item.recommendation for item in found if item.recommendation is not None]
    return [f"recommended {said.count('prompt')} times of {len(said)}"] if said else []


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table, without the columns that have no name."""
    kept = [place for place, name in enumerate(lines[0]) if name]
    rows = [[line[place].replace("\n", " ").replace("|", "/") for place in kept] for line in lines]
    shown = [f"| {' | '.join(row)} |" for row in rows]
    return [shown[0], "|" + " --- |" * len(kept), *shown[1:]]


def summary(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per set."""
    columns = ("set", "bare, written", "8 in context", "PEFT, notebook", "PEFT, grid", "ours", "random", "targets")
    head = f"\n| {' | '.join(columns)} |\n|" + " --- |" * len(columns)
    return "\n".join([head, *(_summary_line(SetResults(name, own)) for name, own in kept.items())])


def _summary_line(own: SetResults) -> str:
    names = (own.reference(), IN_CONTEXT, f"{NOTEBOOK}, P={LENGTH}", BEST, f"{OURS}, P={LENGTH}", RANDOM)
    return f"| {own.name} | {' | '.join(_cell(own, name) for name in names)} | {'; '.join(targets(own))} |"


def _cell(own: SetResults, name: str) -> str:
    greedy = None if own.has_labels else own.greedy(name)
    return _spread(own, name) + ("" if greedy is None else f", exact {greedy:.0f} %")


def _spread(own: SetResults, name: str) -> str:
    values = own.values(name)
    if not values:
        return ""
    return f"{statistics.mean(values):{own.form}}" + (f" ± {statistics.stdev(values):{own.form}}" if values[1:] else "")


def targets(own: SetResults) -> list[str]:
    """Each target that can be judged: whether it is met, and by what figure."""
    ours = f"{OURS}, P={LENGTH}"
    if not own.values(ours):
        return []
    found = [_judged("not below bare", own.gap(ours, own.reference()), own), *_learnt(own, ours)]
    if own.values(BEST):
        found.append(_judged("not below PEFT's grid", own.gap(ours, BEST), own))
        found += [_way(own, ours)] if not own.has_labels and own.values(own.reference()) else []
    if len(own.values(ours)) > 1:
        found.append(_spread_target(own, ours))
    found += _recommended(own.results(ours))
    gap = own.gap(RANDOM, ours)
    if gap is not None:
        found.append(f"{'met' if own.worse_by(gap) > 0 else 'MISSED'}: random is worse ({own.signed(gap[0])})")
    return [each for each in found if each]


def _judged(what: str, gap: Gap | None, own: SetResults) -> str:
    if gap is None:
        return ""
    met = own.worse_by(gap) <= 0
    return f"{'met' if met else 'MISSED'}: {what} ({own.signed(gap[0])}, {own.signed(gap[1])} to {own.signed(gap[2])})"


def _way(own: SetResults, ours: str) -> str:
    bare, best, mean = (statistics.mean(own.values(name)) for name in (own.reference(), BEST, ours))
    way = (bare - mean) / (bare - best) if bare > best else float("inf")
    return f"{'met' if way >= WAY else 'MISSED'}: {way:.2f} of the way to the grid"


def _spread_target(own: SetResults, ours: str) -> str:
    values = own.values(ours)
    spread = statistics.stdev(values) / (1.0 if own.has_labels else statistics.mean(values))
    most = LARGEST_SPREAD["labels" if own.has_labels else "texts"]
    shown = f"{spread:.1f} points" if own.has_labels else f"{100 * spread:.1f} %"
    return f"{'met' if spread <= most else 'MISSED'}: spread {shown}"


def _learnt(own: SetResults, ours: str) -> list[str]:
    """Of labels: the mean not below template and probe; three points above the template with a thousand rows."""
    if not own.has_labels:
        return []
    mean, bare = (statistics.mean(own.values(name)) if own.values(name) else None for name in (ours, BARE))
    probe = own.values(PROBE)
    found = []
    if bare is not None and own.setting["num_train"] >= 1_000:
        found.append(f"{'met' if mean >= bare + LEARNT_POINTS else 'MISSED'}: {mean - bare:+.1f} points above bare")
    elif bare is not None:
        found.append(f"{'met' if mean >= bare else 'MISSED'}: mean {mean - bare:+.1f} points to bare")
    if probe:
        found.append(f"{'met' if mean >= probe[0] else 'MISSED'}: mean {mean - probe[0]:+.1f} points to the probe")
    return found


def _place(name: str) -> tuple[int, str]:
    found = next((place for place, known in enumerate(ORDER) if name.startswith(known)), len(ORDER))
    return found, name


def read_folder(folder: Path) -> dict[str, Any]:
    """Every set's file, in the order of their names."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("smollm2-*.json"))}
    return {name: kept for name, kept in found.items() if "setting" in kept}


def print_tables(folder: Path, names: Sequence[str] = ()) -> None:
    found = read_folder(folder)
    chosen = {name: kept for name, kept in found.items() if not names or name.removeprefix("smollm2-") in names}
    if not chosen:
        raise SystemExit(f"{folder} has no results of a real base; measure first, or give another --out")
    for name, kept in chosen.items():
        print(set_table(name, kept))
    print(summary(chosen))
