"""Several prompts in one pass beside the same prompts one after another: the cases of `training.py` that begin with k.

Rows of 20 random tokens, P = 20, the dtype that `load_base` chooses. Each contender is a child process of its own; both
run the same steps from the same starts, the first of a run of 200 rows and 6 epochs, and their losses are compared.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from training_cases import NUM_SPECIAL, SEED, Request, make_example_set, make_start

ROW_TOKENS, VIRTUAL_TOKENS = 20, 20
PLANNED_ROWS = 200 * 6
TOLERANCE = 0.02  # of a loss; bfloat16 sums in another order


@dataclass(frozen=True, kw_only=True)
class TogetherCase:
    """K prompts, each with its own rows. `target` holds for the shape bloom."""

    name: str
    num_prompts: int
    batch_rows: int
    num_steps: int
    target: float  # times the speed of one after another, at least


TOGETHER = (
    TogetherCase(name="k8-batch8", num_prompts=8, batch_rows=8, num_steps=4, target=1.3),
    TogetherCase(name="k8-batch1", num_prompts=8, batch_rows=1, num_steps=12, target=2.5),
)


def run_together(request: Request) -> Request:
    """Child: train the case's prompts, in one pass or one after another; wall time and each prompt's losses."""
    from softprompt import load_base
    from softprompt.training import prepare

    (case,) = (case for case in TOGETHER if case.name == request["case"])
    base = load_base(request["folder"], dtype="auto", device="cpu")
    candidates = [_candidate(case, base, number) for number in range(case.num_prompts)]
    groups = [candidates] if request["together"] else [[candidate] for candidate in candidates]
    _run(prepare(base, groups[0]).loop, 2)  # warm
    loops = [prepare(base, group).loop for group in groups]
    began = time.perf_counter()
    losses = [loss for loop in loops for loss in _run(loop, case.num_steps)]
    return {"seconds": time.perf_counter() - began, "losses": losses}


def _candidate(case: TogetherCase, base: Any, number: int) -> Any:  # Any: Base to Candidate
    from softprompt import SoftPrompt, TrainConfig
    from softprompt.training import Candidate

    draw = random.Random(f"{SEED}:{number}")
    rows = [
        tuple(draw.randrange(NUM_SPECIAL, base.vocab_size) for _ in range(ROW_TOKENS))
        for _ in range(case.batch_rows * case.num_steps)
    ]
    config = TrainConfig(
        virtual_tokens=VIRTUAL_TOKENS, epochs=-(-PLANNED_ROWS // len(rows)), batch_rows=case.batch_rows, eos=False,
        learning_rate=3e-3, init="vocab", micro_batch_rows=case.batch_rows * case.num_prompts,
    )  # fmt: skip
    start = SoftPrompt(make_start(VIRTUAL_TOKENS, base.hidden_size))
    return Candidate(name=f"{number}", data=make_example_set(rows), config=config, start=start)


def _run(loop: Any, num_steps: int) -> list[list[float]]:  # Any: TrainingLoop
    for _ in loop.events():
        if loop.step == num_steps and all(len(trial.losses) == num_steps for trial in loop.trials):
            break
    return [trial.losses for trial in loop.trials]


def judge_together(case: TogetherCase, together: list[Request], apart: list[Request]) -> Request:
    """Medians of the rounds and their ratio. Ends the program where both do not compute the same."""
    for found, expected in zip(together[0]["losses"], apart[0]["losses"], strict=True):
        if not all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(found, expected, strict=True)):
            raise SystemExit(f"{case.name}: together the losses are {found}, alone {expected}")
    tokens = case.num_prompts * case.batch_rows * case.num_steps * ROW_TOKENS
    seconds = [statistics.median(run["seconds"] for run in runs) for runs in (together, apart)]
    return {
        "name": case.name, "tokens_per_second": [tokens / each for each in seconds], "target": case.target,
        "ratio": seconds[1] / seconds[0],
        "ratios": [b["seconds"] / a["seconds"] for a, b in zip(together, apart, strict=True)],
        "peak_bytes": [statistics.median(run["peak_bytes"] for run in runs) for runs in (together, apart)],
    }  # fmt: skip


def table_of_together(found: list[Request]) -> str:
    lines = [
        "| case | together tok/s | one by one tok/s | ratio | target | together MB | one by one MB |",
        "|" + " --- |" * 7,
    ]
    for case in found:
        missed = "" if case["ratio"] >= case["target"] else " **missed**"
        speeds, peaks = case["tokens_per_second"], case["peak_bytes"]
        lines.append(
            f"| {case['name']} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {case['ratio']:.2f}× | "
            f"≥ {case['target']:g}×{missed} | {peaks[0] / 1e6:,.0f} | {peaks[1] / 1e6:,.0f} |"
        )
    return "\n".join(lines)
