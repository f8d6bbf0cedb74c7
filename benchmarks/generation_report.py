"""The Markdown tables of generation.py, from its report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from generation_cases import PERCENTILES, Request

NOT_TIMED = ("process", "agreement")
BATCH_COLUMNS = (
    "workload", "contender", "tok/s", "ours ÷ it", "first token ms (p50, p95, p99)", "between ms (p50, p95, p99)",
    "MB generating", "same tokens as plain",
)  # fmt: skip


def tables(report: Request) -> str:
    """Everything that the report holds, one table per case."""
    makers = {
        "batch": speeds, "float32": speeds, "poisson": poisson, "studies": studies, "curves": curves,
    }  # fmt: skip
    parts = [(name, make(report[name])) for name, make in makers.items() if name in report]
    seconds = "; ".join(f"{name}: {value:,.0f} s" for name, value in report["case_seconds"].items())
    end = f"Took {seconds}. Load of the machine at the start: {report['load_average']:.2f}."
    return "\n\n".join([*(f"### {name}\n\n{text}" for name, text in parts), end]) + "\n"


def speeds(case: Request) -> str:
    """Each workload's contenders, their memory and set-up, and the judge's result."""
    parts = [table(BATCH_COLUMNS, _speed_rows(case)), processes(case)]
    if case.get("agreement"):
        parts.append(agreement(case["agreement"]))
    parts += [f"{name}: {note}." for name, notes in case["notes"].items() for note in notes]
    return "\n\n".join(parts)


def _speed_rows(case: Request) -> Iterable[list[str]]:
    found = case["medians"]
    for workload in _workloads(found):
        ours = _speed(found, _ours(found), workload)
        for contender, figures in found.items():
            each, speed = figures[workload], figures[workload]["tokens_per_second"]
            equal = case["equal"].get(contender, {}).get(workload)
            yield [
                workload, _named(contender, each, workload), f"{speed:,.1f}", _times(ours, speed),
                _spread(each["first_ms"]), _spread(each["between_ms"]), f"{each['peak_bytes'] / 1e6:,.0f}",
                "" if equal is None else f"{equal:.1%}",
            ]  # fmt: skip


def processes(case: Request) -> str:
    """Time and memory of a contender's process before its first request."""
    rows = [
        [
            name, f"{own['load_seconds']:.1f}", f"{own['setup_seconds']:.1f}", f"{own['setup_bytes'] / 1e6:,.0f}",
            f"{own['process_peak_bytes'] / 1e6:,.0f}",
        ]
        for name, own in ((name, figures["process"]) for name, figures in case["medians"].items())
    ]  # fmt: skip
    return table(("contender", "loading s", "setting up s", "setting up MB", "peak MB, loading included"), rows)


def agreement(judged: Request) -> str:
    """The tokens compared with the best ones of float32 over the same weights."""
    rows = [
        [name, f"{each['best_share']:.1%}", f"{each['worst']:.4f}", f"{each['mean']:.5f}"]
        for name, each in judged["figures"].items()
    ]
    columns = ("contender", "float32's best tokens", f"worst lies below by (≤ {judged['tolerance']:g})", "mean")
    return table(columns, rows)


def poisson(case: Request) -> str:
    found = case["medians"]
    ours = _speed(found, _ours(found), "poisson")
    rows = []
    for name, figures in found.items():
        each = figures["poisson"]
        between = each["between_ms"]
        rows.append([
            name, f"{each['tokens_per_second']:,.1f}", _times(ours, each["tokens_per_second"]), _spread(between),
            f"{between['p95'] / between['p50']:.2f}", _spread(each["first_ms"]), f"{each['latency_ms']['mean']:,.0f}",
            _spread(each["latency_ms"]),
        ])  # fmt: skip
    columns = (
        "contender", "tok/s", "ours ÷ it", "between ms (p50, p95, p99)", "p95 ÷ p50", "first token ms (p50, p95, p99)",
        "mean latency ms", "latency ms (p50, p95, p99)",
    )  # fmt: skip
    head = f"Static batches back to back: {case['capacity']:,.1f} tok/s; arrivals {case['requests_per_s']:.2f}/s."
    return f"{head}\n\n{table(columns, rows)}"


def studies(case: Request) -> str:
    makers = {"same": same, "length": length, "many": many}
    return "\n\n".join(make(case[name]) for name, make in makers.items() if name in case)


def same(speeds: Request) -> str:
    ratio, low, high = interval([a / b for a, b in zip(speeds["different"], speeds["same"], strict=True)])
    return (
        f"Different prompts against one for all: {statistics.median(speeds['different']):,.1f} and "
        f"{statistics.median(speeds['same']):,.1f} tok/s, {ratio:.3f}× (95 % interval {low:.3f} to {high:.3f}, "
        f"{len(speeds['same'])} pairs)."
    )


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 95 % interval (Student's t over the logarithms)."""
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    middle, spread = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    half = float(t.ppf(0.975, len(logs) - 1)) * spread
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def length(first_ms: Request) -> str:
    rows = [[f"P = {name}", f"{each['cold']:,.1f}", f"{each['warm']:,.1f}"] for name, each in first_ms.items()]
    short, long = list(first_ms.values())
    rows.append(["ratio", f"{long['cold'] / short['cold']:.2f}×", f"{long['warm'] / short['warm']:.2f}×"])
    return table(("first token of one request", "new prompt ms", "cached prefix ms"), rows)


def many(found: Request) -> str:
    medians = {name: statistics.median(values) for name, values in found["speeds"].items()}
    warm = next(iter(medians.values()))
    rows = []
    for name, speed in medians.items():
        idle = found["idle"].get(name)
        memory = ["", "", ""] if idle is None else [
            f"{idle['grown_bytes'] / 1024:,.1f}", f"{idle['own_bytes'] / 1024:,.1f}",
            f"{idle['grown_bytes'] / idle['own_bytes']:.2f}×",
        ]  # fmt: skip
        rows.append([name, f"{speed:,.1f}", f"{speed / warm:.3f}×", f"{found['misses'][name]:,.0f}", *memory])
    columns = ("prompts", "tok/s", "÷ warm ones", "misses", "KB per idle prompt", "its own KB", "ratio")
    return table(columns, rows)


def curves(case: Request) -> str:
    found, parts = case["medians"], []
    for varied, points in case["points"].items():
        rows = []
        for value, workload in points:
            own = [figures[workload] for figures in found.values()]
            speeds = [each["tokens_per_second"] for each in own]
            rows.append([
                f"{value:,}", *(f"{speed:,.1f}" for speed in speeds), _times(speeds[0], speeds[-1]),
                *(f"{each['first_ms']['p50']:,.0f}" for each in own),
                *(f"{each['between_ms'].get('p50', math.nan):,.1f}" for each in own),
            ])  # fmt: skip
        names = [[f"{name} {figure}" for name in found] for figure in ("tok/s", "first token ms", "between ms")]
        parts.append(table((varied, *names[0], "ratio", *names[1], *names[2]), rows))
    return "\n\n".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _workloads(found: Request) -> list[str]:
    return [name for name in next(iter(found.values())) if name not in NOT_TIMED]


def _ours(found: Request) -> str | None:
    return next((name for name in found if name.startswith("ours")), None)


def _speed(found: Request, contender: str | None, workload: str) -> float | None:
    return None if contender is None else float(found[contender][workload]["tokens_per_second"])


def _times(ours: float | None, speed: float) -> str:
    return "" if ours is None else f"{ours / speed:.2f}×"


def _spread(figures: Request) -> str:
    return ", ".join(f"{figures[f'p{percent}']:,.1f}" for percent in PERCENTILES if f"p{percent}" in figures)


def _named(contender: str, figures: Request, workload: str) -> str:
    """PEFT's requests are fewer than the workload's, and come one after another."""
    count = round(figures["num_requests"])
    return f"{contender}, {count} one by one" if contender.startswith("PEFT") else contender
