"""Seconds per training step against prompt length, rows and row length, beside the floor that the matrix product sets.

    python benchmarks/training_curves.py --plot docs/training-scaling.svg      # bloomz-560m's shape, dtype auto
    python benchmarks/training_curves.py --shape small

One of the three varies, the others stay at 20 virtual tokens, 8 rows and 64 tokens a row. A point is the median of
three steps after one that does not count. The floor is what a step must compute, the virtual tokens once per step, at
the best rate of the matrix product over the model's own matrices. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from training_cases import (
    SHAPES,
    Group,
    Request,
    answer_child,
    call_child,
    count_flops,
    make_loop,
    make_model,
    matrix_rates,
    run_loop,
)

MIDDLE = {"virtual_tokens": 20, "rows": 8, "length": 64}
CURVES = {
    "virtual_tokens": (1, 4, 20, 50, 100, 200),
    "rows": (1, 2, 4, 8, 16, 32, 64),
    "length": (16, 32, 64, 128, 256, 512, 1_024),
}
LABELS = {"virtual_tokens": "virtual tokens", "rows": "rows per step", "length": "tokens per row"}


def main() -> None:
    flags = parse()
    if flags.child:
        answer_child(flags.child, {"model": make_model, "matrix": matrix_rates, "curve": run_curve})
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(flags, str(flags.model_folder or Path(scratch) / "model"))
    print_table(report["curves"])
    print(json.dumps(report), flush=True)
    if flags.plot:
        plot(report, flags.plot)


def measure(flags: argparse.Namespace, folder: str) -> Request:
    """The matrix rate, before the first curve and after the last, and every point with its floor."""

    def call(kind: str, **request: Any) -> Request:
        return call_child(__file__, kind=kind, folder=folder, threads=flags.threads, **request)

    model = call("model", shape=flags.shape)
    dtype = model["auto"] if flags.dtype == "auto" else flags.dtype
    matrices = {"dtypes": [dtype], "num_tokens": MIDDLE["rows"] * MIDDLE["length"], "matrices": model["matrices"]}
    before = call("matrix", **matrices)["rates"][dtype]
    curves = {}
    for curve in CURVES:
        curves[curve] = call("curve", curve=curve, dtype=dtype, steps=flags.steps)["points"]
        print(f"{curve}: " + ", ".join(f"{point['seconds']:.3f} s" for point in curves[curve]), file=sys.stderr)
    rate = max(*before.values(), *call("matrix", **matrices)["rates"][dtype].values())
    for point in (point for points in curves.values() for point in points):
        point["floor_seconds"] = floor_flops(model, point) / rate
    return {**describe(flags), "dtype": dtype, "model": model, "matrix_rate": rate, "curves": curves}


def run_curve(request: Request) -> Request:
    """Child: every point of one curve, on one base."""
    from softprompt import load_base

    base = load_base(request["folder"], dtype=request["dtype"], device="cpu")
    curve = request["curve"]
    return {"points": [run_point(base, {**MIDDLE, curve: value}, request["steps"]) for value in CURVES[curve]]}


def run_point(base: Any, point: Request, steps: int) -> Request:  # Any: Base
    """The same rows step after step; the first does not count."""
    rows = point["rows"]
    group = Group(virtual_tokens=point["virtual_tokens"], lengths=(point["length"],) * rows)
    run = run_loop(make_loop(base, group, batch_rows=rows), (tuple(range(rows)),) * (1 + steps))
    seconds = run["step_seconds"][1:]
    return {
        **point,
        "seconds": statistics.median(seconds),
        "step_seconds": seconds,
        "micro_batch_rows": run["micro_batch_rows"],
    }


def floor_flops(model: Request, point: Request) -> int:
    num_tokens = point["rows"] * point["length"]
    return count_flops(model, num_tokens + point["virtual_tokens"], num_tokens)


def print_table(curves: dict[str, list[Request]]) -> None:
    print("| varied | virtual tokens | rows | tokens per row | seconds per step | floor | times the floor | tok/s |")
    print(f"|{' --- |' * 8}")
    for curve, points in curves.items():
        for point in points:
            seconds, floor = point["seconds"], point["floor_seconds"]
            speed = point["rows"] * point["length"] / seconds
            sizes = f"{point['virtual_tokens']} | {point['rows']} | {point['length']}"
            print(f"| {LABELS[curve]} | {sizes} | {seconds:.3f} | {floor:.3f} | {seconds / floor:.1f} | {speed:,.0f} |")


def plot(report: Request, target: Path) -> None:
    """Three log-log panels over one axis of seconds, as an SVG that is the same for the same figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "softprompt"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(CURVES), figsize=(10.5, 3.4), sharey=True, layout="constrained")
    for panel, (curve, points) in zip(panels, report["curves"].items(), strict=True):
        draw(panel, curve, points)
    panels[0].set_ylabel("seconds per step")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{report['shape']}, {report['dtype']}, {report['model']['threads']} threads", fontsize="medium")
    figure.savefig(target, metadata={"Date": None})


def draw(panel: Any, curve: str, points: list[Request]) -> None:  # Any: matplotlib's Axes
    values = [point[curve] for point in points]
    panel.loglog(values, [point["seconds"] for point in points], marker="o", markersize=4, label="measured")
    panel.loglog(values, [point["floor_seconds"] for point in points], linestyle="--", color="grey", label="floor")
    fixed = (f"{MIDDLE[name]} {LABELS[name]}" for name in MIDDLE if name != curve)
    panel.set_title(", ".join(fixed), fontsize="small")
    panel.set_xlabel(LABELS[curve])
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def describe(flags: argparse.Namespace) -> Request:
    return {
        "shape": flags.shape,
        "steps": flags.steps,
        "middle": MIDDLE,
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in ("softprompt", "torch", "transformers")},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bloom")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a point; their median counts")
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--model-folder", type=Path, help="keep the model here, and take it from here if it is there")
    parser.add_argument("--plot", type=Path, help="write the three panels to this SVG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.steps < 1:
        parser.error("--steps is 1 or more")
    return flags


if __name__ == "__main__":
    main()
