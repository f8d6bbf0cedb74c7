"""A real base in the bench: which measurements are missing, how long they take, and one after the other.

Several processes may work on the same folder; see quality_store.py. A contender whose settings are no longer those of
its file is measured again.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

from quality_cases import Case
from quality_contenders import GRID_SETS, Contender, contenders_of
from quality_report import set_table, summary
from quality_scoring import text_figures
from quality_store import Settings, Store, as_stored, commit, processor

from softprompt import Base
from softprompt.data import Rows, render_rows, rows_hash

SEEDS = (0, 1, 2, 3, 4)
ONE_SEED_ROWS = 1_000  # a set of so many training rows is measured with one seed
_TRIAL_ROWS = 8
_WAIT_S = 5.0  # for what other processes measure and this one needs


class Bench:
    """The contenders of one set, and the file of what is known of them."""

    def __init__(
        self, case: Case, folder: Path, num_seeds: int, others: dict[str, Settings] | None = None,
        grid_sets: Collection[str] = GRID_SETS, only: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.case, self.store = case, Store(folder, case.name, setting_of(case))
        self.contenders = list(contenders_of(case, self.store, others or {}, grid_sets))
        self._seeds = SEEDS[: num_seeds if len(case.train) < ONE_SEED_ROWS else 1]
        self._only = only
        self.failed: list[tuple[str, int]] = []  # in this process

    @property
    def missing(self) -> list[tuple[Contender, int]]:
        known = self.store.read()
        return [
            (item, seed)
            for item in self.contenders
            if not self._only or any(part in item.name for part in self._only)
            for seed in (self._seeds if item.seeded else SEEDS[:1])
            if (item.name, seed) not in self.failed
            and (
                known.get(item.name, {}).get("settings") != as_stored(item.settings)
                or str(seed) not in known[item.name]["seeds"]
            )
        ]

    def is_ready(self, item: Contender, seed: int) -> bool:
        """Whether what it needs is known."""
        named = {each.name: each for each in self.contenders}
        needed = [(named[name], seed if named[name].seeded else SEEDS[0]) for name in item.after]
        return all(own in self.store.results(each.name, each.settings) for each, own in needed)

    def estimate(self) -> float:
        """Seconds that what is missing takes one process, by the speed of this base on a few of the rows."""
        missing = self.missing
        if not missing:
            return 0.0
        train_tokens, test_tokens = (_num_tokens(self.case.base, rows) for rows in (self.case.train, self.case.test))
        tokens = sum(test_tokens + item.passes * train_tokens for item, _ in missing)
        return tokens * self._seconds_per_token()

    def _seconds_per_token(self) -> float:
        """Of a forward pass, on rows of this set; the second time, as the first checks the base too."""
        some = self.case.train.select(range(min(_TRIAL_ROWS, len(self.case.train))))
        text_figures(self.case.base, some, None)
        began = time.perf_counter()
        text_figures(self.case.base, some, None)
        return (time.perf_counter() - began) / _num_tokens(self.case.base, some)

    def measure(self, item: Contender, seed: int) -> bool:
        """False where another process is measuring it now. An error is shown, and the bench goes on with the rest."""
        with self.store.claim(item.name, seed) as is_mine:
            if is_mine and (item, seed) in self.missing:
                print(f"{time.strftime('%H:%M:%S')} {self.case.name}: {item.name}, seed {seed}", flush=True)
                try:
                    self.store.add(item.name, item.settings, seed, item.run(self.case, seed))
                except Exception:
                    print(traceback.format_exc(), flush=True)
                    self.failed.append((item.name, seed))
        return is_mine

    def table(self) -> str:
        return set_table(self.case.name, self.store.whole())


def setting_of(case: Case) -> Settings:
    return {
        "dtype": str(case.base.dtype).removeprefix("torch."), "rows": rows_hash(case.train) + rows_hash(case.test),
        "num_train": len(case.train), "num_test": len(case.test), "labels": list(case.train.form.labels),
        "has_exact_answers": case.has_exact_answers, "processor": processor(), "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _num_tokens(base: Base, rows: Rows) -> int:
    texts = (f"{row.prompt}{row.text}{''.join(turn['content'] for turn in row.messages)}" for row in render_rows(rows))
    return sum(len(base.encode(text)) for text in texts)


def run(benches: Sequence[Bench], by_sets: bool = False) -> None:
    """Say how long it takes, measure what is missing, print the tables."""
    num_missing = sum(len(bench.missing) for bench in benches)
    minutes = sum(bench.estimate() for bench in benches) / 60
    print(f"{num_missing} measurements are missing, about {minutes:.0f} minutes for one process alone here", flush=True)
    while (found := _measure_one(benches, by_sets)) is not None:
        if not found:
            time.sleep(_WAIT_S)
    for bench in benches:
        print(bench.table(), flush=True)
    print(summary({bench.case.name: bench.store.whole() for bench in benches}), flush=True)
    failed = [f"{bench.case.name}: {name}, seed {seed}" for bench in benches for name, seed in bench.failed]
    if failed:
        raise SystemExit(f"not measured because of errors (above): {'; '.join(failed)}")


def _measure_one(benches: Sequence[Bench], by_sets: bool) -> bool | None:
    """Whether something was measured; None where nothing is left that this or another process could do."""
    is_any_ready, todo = False, in_order(benches, by_sets)
    for bench, item, seed in todo:
        if bench.is_ready(item, seed):
            is_any_ready = True
            if bench.measure(item, seed):
                return True
    if todo and not is_any_ready:
        names = ", ".join(f"{item.name} (seed {seed})" for _, item, seed in todo[:3])
        print(f"{len(todo)} measurements need others that are not chosen or failed: {names}", flush=True)
    return False if is_any_ready else None


def in_order(benches: Sequence[Bench], by_sets: bool) -> list[tuple[Bench, Contender, int]]:
    """What is missing: the bare base, ours, the notebook and random vectors of all sets first, seed by seed."""
    todo = [(number, bench, item, seed) for number, bench in enumerate(benches) for item, seed in bench.missing]
    if by_sets:
        todo.sort(key=lambda own: (own[0], own[2].stage, own[3]))
    else:
        todo.sort(key=lambda own: (own[2].stage, own[3], own[0]))
    return [own[1:] for own in todo]
