"""`encoders.py --speed`: training a classifier on a real encoder beside PEFT with the Trainer, each as a whole process.

Ours is the command `softprompt train` with its defaults on all rows; PEFT is encoders_peft.py with as many virtual
tokens, rows, epochs and batches of 8. Both in the dtype that each has by default, and ours in PEFT's float32 too. The
processes take turns, alone. Wall time is from a process's start to its end, imports, loading and saving included;
the training time is the Trainer's loop, and ours from the first step's begin to the last one's end. Tokens are those of
the texts with [CLS] and [SEP], neither pads nor virtual ones. Memory is the process's largest resident set. The first
round of ours, which measures the machine's matrix kernels once and keeps the choice, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encoders_cases import BATCH_ROWS, LENGTH, NAMES, PEFT_RATES, Texts, base_folder, draw
from quality_store import commit, processor

TARGET = 1.5  # times as fast
OURS, OURS_FLOAT32, PEFT = "softprompt, default dtype", "softprompt, float32", "PEFT and Trainer, float32"
CONTENDERS = (OURS, OURS_FLOAT32, PEFT)
SIZE = 200

Run = dict[str, Any]  # JSON: contender, wall_s, training_s, tokens, peak_bytes


def run(flags: argparse.Namespace) -> None:
    """Measure what is missing, round by round; print the table, and JSON as the last line."""
    rows, folder = draw(flags.material, 0, SIZE), flags.out / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / "rows.jsonl")
    epochs = default_epochs()
    for number in range(flags.rounds + 1):  # 0 is not counted
        for contender in CONTENDERS:
            file = folder / f"round-{number}-{CONTENDERS.index(contender)}.json"
            if not flags.table and not file.exists() and (number or contender != PEFT):
                file.write_text(json.dumps(timed(contender, rows, epochs, folder)))
    kept = [json.loads(file.read_text()) for file in sorted(folder.glob("round-[1-9]-*.json"))]
    print(table(kept), flush=True)
    print(json.dumps(summary(kept)))


def default_epochs() -> int:
    from softprompt.config import TASK_DEFAULTS

    return int(TASK_DEFAULTS["classify"]["epochs"])


def write_rows(rows: Texts, file: Path) -> None:
    lines = [{"text": text, "label": NAMES[label]} for text, label in zip(*rows, strict=True)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def timed(contender: str, rows: Texts, epochs: int, folder: Path) -> Run:
    """One process from its start to its end. Raises SystemExit where it fails."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = peft_command(rows, epochs, out) if contender == PEFT else our_command(contender, folder, out)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode} from {contender}:\n{errors[-2_000:].decode()}")
    return {
        "contender": contender, "wall_s": seconds, "training_s": training_seconds(contender, out),
        "tokens": epochs * count_tokens(rows), "peak_bytes": usage.ru_maxrss * 1024, "commit": commit(),
    }  # fmt: skip


def our_command(contender: str, folder: Path, out: Path) -> list[str]:
    dtype = ["--dtype=float32"] if contender == OURS_FLOAT32 else []
    return [
        sys.executable, "-m", "softprompt", "train", "--base=minilm", "--device=cpu", *dtype, "--task=classify",
        f"--data={folder / 'rows.jsonl'}", "--validation=none", f"--virtual-tokens={LENGTH}", f"--out={out}",
    ]  # fmt: skip


def peft_command(rows: Texts, epochs: int, out: Path) -> list[str]:
    out.mkdir(parents=True)
    request = {
        "base": str(base_folder()), "folder": str(out), "texts": rows.texts, "labels": rows.labels, "seed": 0,
        "virtual_tokens": LENGTH, "epochs": epochs, "batch_rows": BATCH_ROWS, "rate": PEFT_RATES[0],
    }  # fmt: skip
    (out / "request.json").write_text(json.dumps(request))
    return [sys.executable, str(Path(__file__).with_name("encoders_peft.py")), str(out / "request.json")]


def training_seconds(contender: str, out: Path) -> float:
    if contender == PEFT:
        return float(json.loads((out / "trained.json").read_text())["seconds"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sum(line["seconds"] for line in lines if line["kind"] == "step")


def count_tokens(rows: Texts) -> int:
    from transformers import AutoTokenizer

    return sum(len(ids) for ids in AutoTokenizer.from_pretrained(base_folder())(list(rows.texts))["input_ids"])


def summary(kept: Sequence[Run]) -> dict[str, Any]:
    """Medians of each contender, and ratios to PEFT."""
    found: dict[str, Any] = {}
    for contender in CONTENDERS:
        own = [each for each in kept if each["contender"] == contender]
        if own:
            found[contender] = {
                "rounds": len(own),
                "wall_s": statistics.median(each["wall_s"] for each in own),
                "tokens_per_s": statistics.median(each["tokens"] / each["training_s"] for each in own),
                "peak_mb": statistics.median(each["peak_bytes"] for each in own) / 2**20,
            }
    peer = found.get(PEFT)
    for contender in (OURS, OURS_FLOAT32):
        if peer and contender in found:
            own = found[contender]
            own["times_as_fast"] = peer["wall_s"] / own["wall_s"]
            own["times_the_tokens"] = own["tokens_per_s"] / peer["tokens_per_s"]
            own["memory_ratio"] = own["peak_mb"] / peer["peak_mb"]
    threads = len(os.sched_getaffinity(0))
    return {**found, "target": TARGET, "processor": processor(), "cores": threads, "commit": commit()}


def table(kept: Sequence[Run]) -> str:
    """Markdown."""
    found = summary(kept)
    lines = [
        f"\n{SIZE} rows, medians; {found['processor']}, {found['cores']} cores\n",
        "| | whole command, s | times as fast | tokens/s in training | ratio | peak memory, MB |\n|" + " --- |" * 6,
    ]
    for contender in CONTENDERS:
        if (own := found.get(contender)) is not None:
            ratios = [f"{own[name]:.2f}" if name in own else "" for name in ("times_as_fast", "times_the_tokens")]
            lines.append(
                f"| {contender} | {own['wall_s']:.1f} | {ratios[0]} | {own['tokens_per_s']:,.0f} | {ratios[1]} | "
                f"{own['peak_mb']:,.0f} |"
            )
    return "\n".join(lines)
