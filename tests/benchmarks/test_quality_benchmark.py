"""The bench of a real base keeps what it has measured and goes on from there; here on the embedded base."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from softprompt import DataConfig, load_base, read_rows
from softprompt.data.rows import with_labels
from softprompt.demo.tasks import REVIEW_COMPLETION, REVIEW_TEMPLATE
from softprompt.embedded import data_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality_real")


@pytest.fixture
def case(bench: ModuleType) -> Any:
    config = DataConfig(data=str(data_file("reviews.csv")), template=REVIEW_TEMPLATE, completion=REVIEW_COMPLETION)
    rows = with_labels(read_rows(config))
    cases = importlib.import_module("quality_cases")
    base = load_base("embedded", dtype="float32", device="cpu")
    return cases.Case("tiny", base, rows.select(range(16)), rows.select(()), rows.select(range(100, 120)), "Say it.")


def names_and_seeds(bench: Any) -> list[tuple[str, int]]:
    return [(contender.name, seed) for contender, seed in bench.missing]


@pytest.mark.medium
def test_a_stopped_bench_goes_on_and_measures_again_what_has_other_settings(
    bench: ModuleType, case: Any, tmp_path: Path
) -> None:
    short = {"short": {"virtual_tokens": 2, "epochs": 1}}
    first = bench.Bench(case, tmp_path, 1, short)
    asked = names_and_seeds(first)
    assert len(asked) == 7 and first.estimate() > 0

    def stopped(case: Any, seed: int) -> Any:
        raise KeyboardInterrupt

    first.contenders[3] = replace(first.contenders[3], run=stopped)
    with pytest.raises(KeyboardInterrupt):
        first.measure()
    second = bench.Bench(case, tmp_path, 1, short)
    assert names_and_seeds(second) == asked[3:]
    second.measure()
    assert names_and_seeds(bench.Bench(case, tmp_path, 1, short)) == [] and second.estimate() == 0
    assert {seed for _, seed in names_and_seeds(bench.Bench(case, tmp_path, 2, short))} == {1}
    assert names_and_seeds(bench.Bench(case, tmp_path, 1, {"short": {"virtual_tokens": 3}})) == [("short", 0)]
    assert sum(" to " in line for line in second.table().splitlines()) == 6  # the bare base has no difference


def test_an_interval_is_of_the_differences_row_by_row(bench: ModuleType) -> None:
    bare = bench.Result([1.0, 5.0, 9.0], [1, 1, 1], 0.0)
    better = bench.Result([0.5, 4.5, 8.5], [1, 1, 1], 0.0)  # rows differ much, the gaps do not
    assert bench.paired([better], bare) == pytest.approx((-0.5, -0.5, -0.5))
    assert bench.paired([better, bare], bare) == pytest.approx((-0.25, -0.25, -0.25))
    gap, low, high = bench.paired([bench.Result([9.0, 5.0, 1.0], [1, 1, 1], 0.0)], bare)
    assert gap == 0 and low < -2 and high > 2
