"""The Markdown tables of real_base.py, from its report, and the machine that they stand under.

    python benchmarks/real_base_report.py build/real-base-avx2 build/real-base

prints one table of all shapes that these folders of real_base.py hold rounds of, a column for each folder: the first
table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from generation_cases import equal_share
from generation_report import table
from real_base_cases import DECODE_TARGETS, INT8_TARGETS, TRAIN_CASES
from training_cases import Request, count_flops

KINDS = {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}  # best first
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def machine(flags: argparse.Namespace) -> Request:
    """What every table is published with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    instructions = named.get("flags", "").split()
    kind = next((name for flag, name in KINDS.items() if flag in instructions), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "processor": f"{named.get('model name')}, family {named.get('cpu family')}, model {named.get('model')}",
        "kind": f"{kind} held to AVX2" if flags.avx2 else kind,
        "threads": flags.threads or len(os.sched_getaffinity(0)),
        "rows": "embedded" if flags.data is None else "real",
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }


def tables(report: Request) -> str:
    """The machine, and a table per case that has rounds."""
    setting, rounds = report["setting"], report["rounds"]
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    head = (
        f"{setting['shape']}, {setting['model']['num_parameters']:,} parameters, float32; {setting['date']}, commit "
        f"{setting['commit']}; {setting['processor']} ({setting['kind']}), {setting['threads']} threads; {versions}."
    )
    makers = {"decode": decode, "int8": int8}
    parts = [head]
    if any(case.name in rounds for case in TRAIN_CASES):
        parts.append(training(report))
    parts += [make(report) for name, make in makers.items() if name in rounds]
    seconds = "; ".join(f"{name} {value:,.0f} s" for name, value in report["seconds"].items())
    return "\n\n".join([*parts, f"Took {seconds}."]) + "\n"


def training(report: Request) -> str:
    columns = (
        "case (rounds)", "ours s", "of it set-up", "PEFT s", "ratio", "target", "ours tok/s", "PEFT tok/s",
        "whole process s", "loading s", "peak MB", "share of the matrix rate", "mean loss",
    )  # fmt: skip
    rows = [training_row(report, case.name, case.target) for case in TRAIN_CASES if case.name in report["rounds"]]
    return table(columns, rows)


def training_row(report: Request, case: str, target: float) -> Sequence[str]:
    ours, peer = (report["rounds"][case].get(name, []) for name in ("ours", "PEFT"))
    if not ours or not peer:
        return [f"{case}: failed", *[""] * 12]
    seconds, other = median(ours, "seconds"), median(peer, "seconds")
    tokens, peer_tokens = ours[0]["num_tokens"], peer[0]["num_tokens"]
    note = "" if tokens == peer_tokens else f" ({tokens} against {peer_tokens} tokens)"
    shares = [count_flops(report["setting"]["model"], tokens, tokens) / each / report["rates"][case]
              for each in (seconds, other)]  # fmt: skip
    return [
        f"{case} ({len(ours)}){note}", f"{seconds:.1f}", f"{median(ours, 'setup_seconds'):.1f}", f"{other:.1f}",
        f"{other / seconds:.2f}x", aim(report, other / seconds, target), f"{tokens / seconds:,.0f}",
        f"{peer_tokens / other:,.0f}", both(ours, peer, "process_seconds", 1, ".1f"),
        f"{only(ours, 'load_seconds')} / {only(peer, 'load_seconds')}",
        both(ours, peer, "peak_bytes", 1e6, ",.0f"), f"{shares[0]:.0%} / {shares[1]:.0%} of "
        f"{report['rates'][case] / 1e9:,.0f} GFLOP/s",
        " / ".join(f"{statistics.fmean(runs[0]['losses']):.3f}" for runs in (ours, peer)),
    ]  # fmt: skip


def decode(report: Request) -> str:
    """Streams against transformers' generate in the same batch."""
    rounds, agreement = report["rounds"]["decode"], report.get("agreement", {})
    columns = (
        "streams (rounds)", "ours tok/s", "generate tok/s", "ratio", "target", "first token ms", "between tokens ms",
        "equal answers",
    )  # fmt: skip
    rows = []
    for name in rounds["ours"][0]["streams"] if rounds["ours"] and rounds["generate"] else ():
        ours, peer = ([run["streams"][name] for run in rounds[side] if name in run["streams"]]
                      for side in ("ours", "generate"))  # fmt: skip
        speed, other = median(ours, "tokens_per_second"), median(peer, "tokens_per_second")
        equal = agreement.get("equal_answers", {}).get(name)
        rows.append([
            f"{name} ({len(ours)})", f"{speed:,.1f}", f"{other:,.1f}", f"{speed / other:.2f}x",
            aim(report, speed / other, DECODE_TARGETS.get(int(name.split()[0]))),
            both_p50(ours, peer, "first_ms"), both_p50(ours, peer, "between_ms"),
            "" if equal is None else f"{equal:.0%}",
        ])  # fmt: skip
    worst = "; ".join(f"{name} {value:.2g}" for name, value in agreement.get("worst", {}).items())
    peaks = both(rounds["ours"], rounds["generate"], "peak_bytes", 1e6, ",.0f")
    end = f"Peak MB {peaks}. Nats that the worst token lies below the best of a float32 judge: {worst}."
    return f"{table(columns, rows)}\n\n{end}"


def int8(report: Request) -> str:
    """One stream, with fewer bytes per weight."""
    rounds = {name: runs for name, runs in report["rounds"]["int8"].items() if runs}
    speeds = {
        name: statistics.median(each["tokens_per_second"] for run in runs for each in run["streams"].values())
        for name, runs in rounds.items()
    }
    exact = rounds["ours"][-1]["answers"] if "ours" in rounds else {}
    rows = [
        [
            f"{name} ({len(rounds[name])})", f"{speed:.1f}", *(ratio(speed, speeds.get(peer)) for peer in INT8_TARGETS),
            same_tokens(exact, rounds[name][-1].get("answers", {})),
        ]
        for name, speed in speeds.items()
    ]  # fmt: skip
    versions = {run["version"] for runs in rounds.values() for run in runs if "version" in run}
    end = "" if not versions else f"\n\nllama-cpp-python {', '.join(sorted(versions))}; without a soft prompt."
    columns = ("one stream (rounds)", "tok/s", *(f"÷ {peer}" for peer in INT8_TARGETS), "tokens as float32's")
    return table(columns, rows) + end


def same_tokens(some: Request, others: Request) -> str:
    """The share of positions with the same token, in the workloads of both; llama.cpp has other inputs."""
    shares = [equal_share(some[name], others[name]) for name in some if name in others]
    return "" if not shares else f"{statistics.fmean(shares):.0%}"


def compare(folders: Sequence[Path]) -> str:
    """A row per shape and case, a column per folder: ours, the peer's and the ratio."""
    reports = {folder: [json.loads(file.read_text()) for file in sorted(folder.glob("rounds-*.json"))]
               for folder in folders}  # fmt: skip
    cells = {folder: dict(pair for report in found for pair in cells_of(report)) for folder, found in reports.items()}
    names = list(dict.fromkeys(name for each in cells.values() for name in each))
    heads = [column_head(found) for found in reports.values()]
    return table(
        ("work, ours / peer", *heads), [[name, *(each.get(name, "") for each in cells.values())] for name in names]
    )


def column_head(reports: Sequence[Request]) -> str:
    """Kind of processor, threads, and the commits and dates of the rounds."""
    settings = [report["setting"] for report in reports]
    found = [f"{each['kind']}, {each['threads']} threads, {each['date']}, {each['commit']}" for each in settings]
    return "; ".join(dict.fromkeys(found))


def cells_of(report: Request) -> Iterator[tuple[str, str]]:
    """Each measured figure's name and text."""
    shape, rounds = report["setting"]["shape"], report["rounds"]
    for case in TRAIN_CASES:
        found = rounds.get(case.name, {})
        if found.get("ours") and found.get("PEFT"):
            ours, peer = (median(found[side], "seconds") for side in ("ours", "PEFT"))
            flops = count_flops(report["setting"]["model"], *[found["ours"][0]["num_tokens"]] * 2)
            share = flops / ours / report["rates"][case.name]
            yield (
                f"{shape}, {case.name}, s",
                f"{ours:.1f} / {peer:.1f} = **{peer / ours:.2f}x**, {share:.0%} of the rate",
            )
    for case, peer_name in (("decode", "generate"), ("int8", "llama.cpp Q8_0")):
        sides = {name: runs for name, runs in rounds.get(case, {}).items() if runs}
        first = "ours int8" if case == "int8" else "ours"
        if first not in sides or peer_name not in sides:
            continue
        for streams in sides[first][0]["streams"]:
            speeds = [statistics.median(run["streams"][streams]["tokens_per_second"] for run in sides[name])
                      for name in (first, peer_name)]  # fmt: skip
            yield (f"{shape}, {case} {streams}, tokens/s",
                   f"{speeds[0]:,.1f} / {speeds[1]:,.1f} = **{speeds[0] / speeds[1]:.2f}x**")  # fmt: skip


def ratio(speed: float, other: float | None) -> str:
    return "" if other is None else f"{speed / other:.2f}x"


def aim(report: Request, found: float, target: float | None) -> str:
    """The target, which is of SmolLM2 on AVX2; a miss is marked."""
    if target is None or report["setting"]["shape"] != "smollm2":
        return ""
    return f"≥ {target:g}x" + ("" if found >= target else " **missed**")


def median(runs: Sequence[Request], figure: str) -> float:
    return statistics.median(run[figure] for run in runs)


def only(runs: Sequence[Request], figure: str) -> str:
    """The median in seconds; ? where it is not known."""
    return f"{median(runs, figure):.1f}" if all(figure in run for run in runs) else "?"


def both(ours: Sequence[Request], peer: Sequence[Request], figure: str, unit: float, form: str) -> str:
    """Ours / the peer's; empty where a side has no such figure."""
    if any(figure not in run for run in (*ours, *peer)):
        return ""
    return " / ".join(format(median(runs, figure) / unit, form) for runs in (ours, peer))


def both_p50(ours: Sequence[Request], peer: Sequence[Request], figure: str) -> str:
    return " / ".join(f"{statistics.median(each[figure]['p50'] for each in runs):,.0f}" for runs in (ours, peer))


if __name__ == "__main__":
    print(compare([Path(folder) for folder in sys.argv[1:]]))
