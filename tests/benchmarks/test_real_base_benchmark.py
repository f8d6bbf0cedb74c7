"""The benchmark beside today's peers runs from end to end on a tiny model, keeps its rounds and adds to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_base.py"


def run(out: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--shape", "small", "--threads", "1", "--streams", "1,4", "--out", str(out)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_of_a_later_run_are_counted_with_those_before(tmp_path: Path) -> None:
    first = run(tmp_path, "--rounds", "1")
    assert {len(runs) for case in first["rounds"].values() for runs in case.values()} == {1}
    assert first["agreement"]["equal_answers"] == {"1 stream": 1.0, "4 streams": 1.0}
    (ours,), (peer,) = first["rounds"]["train-p4"]["ours"], first["rounds"]["train-p4"]["PEFT"]
    assert ours["num_tokens"] == peer["num_tokens"] and len(ours["losses"]) == len(peer["losses"]) == 2
    second = run(tmp_path, "--rounds", "1", "--cases", "decode")
    assert {case: len(runs["ours"]) for case, runs in second["rounds"].items()} == {"train-p4": 1, "decode": 2}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rounds_of_another_setting_are_not_counted_together(tmp_path: Path) -> None:
    run(tmp_path, "--rounds", "0")
    command = [sys.executable, str(SCRIPT), "--shape", "small", "--avx2", "--rounds", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0 and "kind" in done.stderr
