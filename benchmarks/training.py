"""softprompt's training beside PEFT with transformers.Trainer: same rows, batches and start, in turn.

    python benchmarks/training.py                       # bloomz-560m's shape, seeded random weights
    python benchmarks/training.py --cases p4-float32,p4-default --rounds 1
    python benchmarks/training.py --shape small --steps 2 --rounds 1
    python benchmarks/training.py --cases k8-batch8,k8-batch1   # several prompts in one pass, see training_together.py

Each run is a child process of its own: loading counts in its peak memory and not in its time. A token is a text token
of a row, neither a pad nor a virtual one. The share is what a step must compute (see `count_flops`) per second, of what
the matrix product reaches on the model's own matrices. Targets are for bloomz-560m's shape. Prints a Markdown table;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from training_cases import (
    BATCH_ROWS,
    CASES,
    GROUPS,
    SHAPES,
    SHARE_TARGETS,
    WARMUP_STEPS,
    Batches,
    Case,
    ChildError,
    Group,
    Request,
    answer_child,
    batches_of,
    call_child,
    count_flops,
    count_tokens,
    differences,
    make_loop,
    make_model,
    make_rows,
    make_start,
    matrix_rates,
    run_loop,
)
from training_together import TOGETHER, TogetherCase, judge_together, run_together, table_of_together

IGNORED = -100  # transformers' label for "no loss here"
# Relative, of a group's first step; bfloat16's gradient is only reported.
TOLERANCES = {
    "losses": {"float32": 1e-3, "bfloat16": 3e-2},
    "grad_norms": {"float32": 1e-2, "bfloat16": math.inf},
}
COLUMNS = (
    "case", "ours tok/s", "peer tok/s", "ratio", "target", "ours MB", "peer MB", "memory ratio", "target",
    "share of the matrix rate", "target",
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """Who trains, in which dtype."""

    side: str  # ours or peer
    dtype: str

    def __str__(self) -> str:
        return f"{self.side}-{self.dtype}"


@dataclass(frozen=True)
class Bench:
    """What every child process is told, and what is known of the model."""

    flags: argparse.Namespace
    folder: str
    model: Request

    def call(self, kind: str, **request: Any) -> Request:
        return call_child(__file__, kind=kind, folder=self.folder, threads=self.flags.threads, **request)

    def batches(self, group: str) -> Batches:
        return batches_of(GROUPS[group])[: self.flags.steps]

    def contenders(self, case: Case) -> tuple[Contender, Contender]:
        """Ours and the peer; `auto` is the dtype it resolves to, so that one run serves both names."""
        return Contender("ours", self.model["auto"] if case.ours == "auto" else case.ours), Contender("peer", case.peer)


def main() -> None:
    flags = parse()
    if flags.child:
        kinds = {"model": make_model, "matrix": matrix_rates, "ours": run_ours, "peer": run_peer}
        kinds["together"] = run_together
        answer_child(flags.child, kinds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(flags.model_folder or Path(scratch) / "model")
        request = {"kind": "model", "folder": folder, "threads": flags.threads, "shape": flags.shape}
        bench = Bench(flags, folder, call_child(__file__, **request))
        say(f"{flags.shape}: {bench.model['num_parameters']:,} parameters, auto is {bench.model['auto']}")
        groups = {name: measure_group(bench, name) for name in dict.fromkeys(case.group for case in flags.cases)}
        together = [measure_together(bench, case) for case in flags.together]
    cases = [judge(bench, case, groups) for case in flags.cases]
    report = {**describe(bench), "groups": groups, "cases": cases, "together": together}
    if cases:
        print_table(cases, has_targets=flags.shape == "bloom")
    if together:
        print(table_of_together(together))
    print(json.dumps(report))
    sys.exit(any("error" in run for group in groups.values() for runs in group["runs"].values() for run in runs))


def measure_together(bench: Bench, case: TogetherCase) -> Request:
    """The case's prompts in one pass and one after another, in turn."""
    runs: dict[bool, list[Request]] = {True: [], False: []}
    for number in range(1, bench.flags.rounds + 1):
        for together, found in runs.items():
            found.append(bench.call("together", case=case.name, together=together))
            say(f"{case.name} round {number}: {'together' if together else 'one by one'} {found[-1]['seconds']:.1f} s")
    return judge_together(case, runs[True], runs[False])


def measure_group(bench: Bench, name: str) -> Request:
    """The group's contenders in turn, round by round, and the matrix rates before the first and after the last."""
    pairs = [bench.contenders(case) for case in bench.flags.cases if case.group == name]
    contenders = list(dict.fromkeys(contender for pair in pairs for contender in pair))
    dtypes = list(dict.fromkeys(contender.dtype for contender in contenders))
    before = measure_matrices(bench, name, dtypes)
    runs: dict[str, list[Request]] = {str(contender): [] for contender in contenders}
    for number in range(1, bench.flags.rounds + 1):
        for contender in contenders:
            runs[str(contender)].append(measure(bench, name, contender, number))
        check_agreement(name, {contender: runs[str(contender)][-1] for contender in contenders})
    after = measure_matrices(bench, name, dtypes)
    rates = {dtype: max(*before[dtype].values(), *after[dtype].values()) for dtype in dtypes}
    medians = {str(contender): summarise(bench, name, contender, runs, rates) for contender in contenders}
    return {"medians": medians, "matrix_rates": rates, "matrices": [before, after], "runs": runs}


def measure_matrices(bench: Bench, group: str, dtypes: list[str]) -> dict[str, dict[str, float]]:
    """FLOP/s of each dtype and matrix, with as many rows as a batch has tokens on average."""
    batches = bench.batches(group)
    num_tokens = round(count_tokens(GROUPS[group], batches)[0] / len(batches))
    answer = bench.call("matrix", dtypes=dtypes, num_tokens=num_tokens, matrices=bench.model["matrices"])
    rates: dict[str, dict[str, float]] = answer["rates"]
    for dtype, found in rates.items():
        say(f"{group} {dtype}: {max(found.values()) / 1e9:,.1f} GFLOP/s of matrix product over {num_tokens} tokens")
    return rates


def measure(bench: Bench, group: str, contender: Contender, number: int) -> Request:
    """One run; one that fails is reported and leaves its error, and the others go on."""
    flags = bench.flags
    try:
        run = bench.call(
            contender.side, group=group, dtype=contender.dtype, steps=flags.steps, warmup_steps=flags.warmup_steps,
            vocab=bench.model["vocab"],
        )  # fmt: skip
    except ChildError as error:
        say(f"{group} {contender} round {number}: FAILED, {error}")
        return {"error": str(error)}
    tokens, _ = count_tokens(GROUPS[group], bench.batches(group))
    say(
        f"{group} {contender} round {number}: {tokens / run['epoch_seconds']:,.0f} tok/s, "
        f"{run['peak_bytes'] / 1e6:,.0f} MB, first loss {run['losses'][0]:.5f}, gradient {run['grad_norms'][0]:.6f}"
    )
    return run


def check_agreement(group: str, runs: dict[Contender, Request]) -> None:
    """Every contender's first step is the float32 peer's, or they do not compute the same thing."""
    done = {contender: run for contender, run in runs.items() if "error" not in run}
    if not done:
        return
    reference = Contender("peer", "float32")
    reference = reference if reference in done else next(iter(done))
    for contender, run in done.items():
        for figure, tolerances in TOLERANCES.items():
            found, expected = run[figure][0], done[reference][figure][0]
            tolerance = max(tolerances[contender.dtype], tolerances[reference.dtype])
            if not math.isclose(found, expected, rel_tol=tolerance):
                raise SystemExit(f"{group}: first of {figure} is {found} in {contender}, {expected} in {reference}")


def summarise(
    bench: Bench, group: str, contender: Contender, runs: dict[str, list[Request]], rates: dict[str, float]
) -> Request | None:
    """Medians over the rounds; None where every round failed."""
    done = [run for run in runs[str(contender)] if "error" not in run]
    if not done:
        return None
    batches = bench.batches(group)
    tokens, labelled = count_tokens(GROUPS[group], batches)
    seconds = statistics.median(run["epoch_seconds"] for run in done)
    rate = count_flops(bench.model, tokens, labelled) / seconds
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_per_epoch": seconds,
        "seconds_per_step": seconds / len(batches),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in done),
        "share": rate / rates[contender.dtype],
        "first_loss": done[0]["losses"][0],
        "last_loss": done[0]["losses"][-1],
        "first_grad_norm": done[0]["grad_norms"][0],
        "threads": done[0]["threads"],
    }


def judge(bench: Bench, case: Case, groups: dict[str, Request]) -> Request:
    """The case's two contenders beside each other and its targets."""
    ours, peer = bench.contenders(case)
    medians = groups[case.group]["medians"]
    found, other = medians[str(ours)], medians[str(peer)]
    both = found is not None and other is not None
    return {
        **asdict(case),
        "ours": str(ours),
        "peer": str(peer),
        "ours_median": found,
        "peer_median": other,
        "speed_ratio": found["tokens_per_second"] / other["tokens_per_second"] if both else None,
        "memory_ratio": found["peak_bytes"] / other["peak_bytes"] if both else None,
        "share": found["share"] if found is not None else None,
        "share_target": SHARE_TARGETS[ours.dtype],
    }


def print_table(cases: list[Request], has_targets: bool) -> None:
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * len(COLUMNS)}")
    for case in cases:
        print(f"| {' | '.join(table_row(case, has_targets))} |")


def table_row(case: Request, has_targets: bool) -> list[str]:
    ours, peer = case["ours_median"], case["peer_median"]
    speed = (case["speed_ratio"], case["speed"] if has_targets else None)
    memory = (case["memory_ratio"], case["memory"] if has_targets else None)
    share = (case["share"], case["share_target"] if has_targets else None)
    return [
        f"{case['name']} ({case['ours']}, {case['peer']})",
        cell(ours, "tokens_per_second", 1), cell(peer, "tokens_per_second", 1),
        "failed" if speed[0] is None else f"{speed[0]:.2f}×", target(*speed, "≥ {:g}×"),
        cell(ours, "peak_bytes", 1e6), cell(peer, "peak_bytes", 1e6),
        "failed" if memory[0] is None else f"{memory[0]:.2f}", target(*memory, "≤ {:g}", at_most=True),
        "failed" if share[0] is None else f"{share[0]:.0%}", target(*share, "≥ {:.0%}"),
    ]  # fmt: skip


def cell(median: Request | None, figure: str, unit: float) -> str:
    return "failed" if median is None else f"{median[figure] / unit:,.0f}"


def target(found: float | None, wanted: float | None, text: str, at_most: bool = False) -> str:
    """The target, and whether it was missed; empty without one."""
    if wanted is None:
        return ""
    met = found is not None and (found <= wanted if at_most else found >= wanted)
    return text.format(wanted) + ("" if met else " **missed**")


def describe(bench: Bench) -> Request:
    flags = bench.flags
    packages = ("softprompt", "torch", "transformers", "peft", "accelerate")
    return {
        "shape": flags.shape,
        "model": bench.model,
        "rounds": flags.rounds,
        "steps": flags.steps,
        "warmup_steps": flags.warmup_steps,
        "batch_rows": BATCH_ROWS,
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def run_ours(request: Request) -> Request:
    """Child: softprompt."""
    from softprompt import load_base

    group = GROUPS[request["group"]]
    base = load_base(request["folder"], dtype=request["dtype"], device="cpu")
    began = time.perf_counter()
    loop = make_loop(base, group)
    prepared = time.perf_counter() - began
    batches = batches_of(group)
    if request["warmup_steps"]:
        run_loop(loop, batches[: request["warmup_steps"]])
    return {**run_loop(loop, batches[: request["steps"]]), "prepare_seconds": prepared}


def run_peer(request: Request) -> Request:
    """Child: PEFT's prompt tuning under transformers.Trainer, as in the notebook "Prompt Tuning With PEFT"."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    group = GROUPS[request["group"]]
    base = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=getattr(torch, request["dtype"]))
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=group.virtual_tokens)
    model = get_peft_model(base, settings)
    batches = batches_of(group)
    if request["warmup_steps"]:
        run_trainer(model, group, request, batches[: request["warmup_steps"]])
    return run_trainer(model, group, request, batches[: request["steps"]])


def run_trainer(model: Any, group: Group, request: Request, batches: Batches) -> Request:  # Any: PeftModel
    """One epoch of these batches from the group's start."""
    weight_PH = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight_PH.copy_(make_start(*weight_PH.shape))
    rows = make_rows(group, request["vocab"])
    chosen = [{"input_ids": list(rows[index])} for batch in batches for index in batch]
    with tempfile.TemporaryDirectory() as folder:
        trainer, run = make_trainer(model, chosen, make_collator(group, request["folder"]), folder)
        trainer.train()
    return {**run, "step_seconds": differences(run["step_seconds"])}


def make_trainer(model: Any, rows: list[Request], collate: Any, folder: str) -> tuple[Any, Request]:  # Any: Trainer
    """The Trainer, and what it writes down: its wall times, and losses and gradients per target.

    transformers divides by the labels behind the first position; behind virtual tokens the first is a target as well.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback

    run: Request = {"step_seconds": [], "losses": [], "grad_norms": []}
    weight_PH = model.prompt_encoder["default"].embedding.weight

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            num_targets = int((inputs["labels"] != IGNORED).sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            scale = 1.0 if num_items_in_batch is None else float(num_items_in_batch) / num_targets
            run["losses"].append(float(loss) * scale)
            run["grad_norms"].append(float(weight_PH.grad.norm()) * scale)
            return loss

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            run["step_seconds"].append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            run["step_seconds"].append(time.perf_counter())

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            run["epoch_seconds"] = time.perf_counter() - run["step_seconds"][0]

    trainer = InOrder(
        model=model, args=make_arguments(folder), train_dataset=rows, data_collator=collate, callbacks=[Clock()]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, run


def make_arguments(folder: str) -> Any:  # Any: TrainingArguments
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH_ROWS,
        num_train_epochs=1,
        learning_rate=3e-3,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def make_collator(group: Group, folder: str) -> Any:  # Any: a collator
    """The notebook's collator, which labels all text; with labels of our own, the same padding and those labels."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    whole = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(folder), mlm=False)
    if group.num_labelled is None:
        return whole

    def collate(rows: list[Request]) -> Request:
        batch = whole(rows)
        for row, labels in zip(rows, batch["labels"], strict=True):
            labels[: len(row["input_ids"]) - group.num_labelled] = IGNORED
        return batch

    return collate


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bloom")
    parser.add_argument(
        "--cases", default=",".join(case.name for case in (*CASES, *TOGETHER)), help="names, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="only the epoch's first batches")
    parser.add_argument("--warmup-steps", type=int, help="untimed steps, an epoch at most; default 1, small 6")
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--model-folder", type=Path, help="keep the model here, and take it from here if it is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    known: dict[str, Case | TogetherCase] = {case.name: case for case in (*CASES, *TOGETHER)}
    if flags.rounds < 1 or (flags.steps is not None and flags.steps < 1):
        parser.error("--rounds and --steps are 1 or more")
    unknown = [name for name in flags.cases.split(",") if name not in known]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known are {', '.join(known)}")
    chosen = [known[name] for name in flags.cases.split(",")]
    flags.cases = [case for case in chosen if isinstance(case, Case)]
    flags.together = [case for case in chosen if isinstance(case, TogetherCase)]
    flags.warmup_steps = WARMUP_STEPS[flags.shape] if flags.warmup_steps is None else flags.warmup_steps
    return flags


if __name__ == "__main__":
    main()
