"""The generation benchmark runs from end to end on a tiny model, and its own checks hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generation.py"
CASES = "batch,single,float32,poisson,same,length,many,curves"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_of_the_generation_benchmark_has_every_case(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--cases", CASES, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "generation.json").read_text())
    assert set(report["batch"]["medians"]) == {"ours", "plain", "PEFT float32"}
    assert set(report["poisson"]["medians"]) == set(report["curves"]["medians"]) == {"ours", "plain"}
    assert all(not report[case]["errors"] for case in ("batch", "float32", "poisson", "curves"))
    float32 = report["float32"]["agreement"]
    assert float32["figures"]["ours float32"]["worst"] <= float32["tolerance"]
    assert float32["figures"]["wrong prompts"]["worst"] > float32["tolerance"]  # control
    misses = report["studies"]["many"]["misses"]
    assert misses["16"] == 0 and all(misses[pool] == 20 for pool in ("60", "100"))
