"""The serving benchmark runs from end to end on the embedded base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_of_the_serving_benchmark_has_every_case(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--cases",
        "cost,streams,open,idle,job,soak",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "serving.json").read_text())
    assert report["cost"]["own_share"] > 0 and report["job"]["training_share"] > 0
    assert set(report["streams"]) == {"1", "4"} and report["soak"]["requests"] > 0
    assert all(not found["errors"] for found in report["streams"].values())
