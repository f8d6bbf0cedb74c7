"""The time to a figure: what a curve says, what is kept, and that nothing is timed beside something else."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTING = {"dtype": "float32", "threads": 1, "test_rows": None}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality_time")


def run_of(contender: str, seed: int, *points: tuple[float, float], labels: bool = False) -> dict[str, Any]:
    found = [{"seconds": seconds, "prompt": "", "figure": figure} for seconds, figure in points]
    last = points[-1][0] if points else 0.0
    return {
        "contender": contender,
        "seed": seed,
        "seconds": last + 1,
        "settings": "",
        "points": found,
        "labels": labels,
    }


def test_a_figure_is_reached_by_the_first_prompt_that_is_as_good(module: Any) -> None:
    curve = run_of(module.OURS, 0, (10, 4.0), (20, 3.0), (30, 3.5))
    assert module.time_to(curve, 3.2) == 20 and module.time_to(curve, 2.9) == float("inf")
    accuracy = run_of(module.OURS, 0, (10, 60.0), (20, 80.0), (30, 70.0), labels=True)
    assert module.time_to(accuracy, 70.0) == 20 and module.time_to(accuracy, 80.1) == float("inf")
    assert module.time_to({**accuracy, "contender": module.WINNER}, 99.0) == 20  # to what it ends with itself


def test_the_table_compares_with_the_end_of_pefts_best(module: Any) -> None:
    best = [run_of(module.WINNER, seed, (10, 4.0), (60, end)) for seed, end in enumerate((3.0, 3.2))]
    ours = [run_of(module.OURS, seed, (10, 3.5), (20, 3.1), (30, 2.9)) for seed in range(2)]
    lines = module.table("quotes-25", [*best, *ours, run_of(module.NOTEBOOK, 0, (50, 4.5))]).splitlines()
    assert "the figure to reach is 3.100" in lines[1]
    assert [line.split(" | ")[1:] for line in lines[-3:]] == [
        ["2", "2.900 ± 0.000", "31.0", "20.0", "2", "3.00 |"],
        ["1", "4.500", "51.0", "never", "0", " |"],
        ["2", "3.100 ± 0.141", "61.0", "60.0", "2", "1.00 |"],
    ]
    assert "is measured and scored yet" in module.table("quotes-25", ours)


def test_pefts_best_settings_come_from_the_bench_or_are_asked_for(module: Any, tmp_path: Path) -> None:
    kept = {"contenders": {module.BEST: {"seeds": {"0": {"note": "vocabulary, 0.06"}}}}}
    (tmp_path / "smollm2-quotes-25.json").write_text(json.dumps(kept))
    assert module.winner_of(tmp_path, "quotes-25") == "vocabulary, 0.06"
    for folder in (None, tmp_path):
        with pytest.raises(SystemExit, match="has no winner of PEFT's grid; measure it"):
            module.winner_of(folder, "sst2-200")


def test_a_finished_run_is_not_timed_again_and_other_settings_are_refused(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for contender in module.CONTENDERS:
        folder = tmp_path / "topics-12" / f"{module.file_name(contender)}-0"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run_of(contender, 0, (10, 50.0), labels=True)))
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    common = ["quality_time.py", str(tmp_path), "--out", str(tmp_path), "--cases", "topics-12", "--seeds", "1",
              "--winner", "vocabulary, 0.06", "--threads", "1", "--dtype"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*common, "float32"])
    module.main()
    assert capsys.readouterr().out.count("| 1 | 50.0 |") == 3
    monkeypatch.setattr(sys, "argv", [*common, "bfloat16"])
    with pytest.raises(SystemExit, match="has runs of another dtype; give another --out"):
        module.main()


def test_only_one_process_measures_in_a_folder(module: Any, tmp_path: Path) -> None:
    both = module.only_process(tmp_path), module.only_process(tmp_path)
    with pytest.raises(SystemExit, match="another process measures"), both[0], both[1]:
        pass
