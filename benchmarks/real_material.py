"""The demo's job on real material: a real small Llama, role prompts, quotes and SST-2, beside PEFT's defaults.

    python benchmarks/real_material.py ../shared/data --seeds 5

The folder holds `models/stories260K-llama`, `awesome-chatgpt-prompts/prompts.csv`, `english-quotes/quotes.jsonl` and
`sst2/{train,dev}.txt`. Prints a Markdown table of means and standard deviations over seeds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from softprompt import DataConfig, TrainConfig, load_base
from softprompt.demo import Finding, Task, run_demo
from softprompt.demo.tasks import REVIEW_COMPLETION, REVIEW_TEMPLATE

SST2_NAMES = {"0": "negative", "1": "positive"}


def main() -> None:
    flags = parse()
    base = load_base(str(flags.folder / "models" / "stories260K-llama"), dtype="float32")
    found: dict[str, list[Finding]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tasks = make_tasks(flags.folder, Path(scratch))
        for seed in range(flags.seeds):
            seeded = tuple(replace(task, train=replace(task.train, seed=seed)) for task in tasks)
            for item in run_demo(base, Path(scratch) / str(seed), print, tasks=seeded).findings:
                found.setdefault(item.task, []).append(item)
    print("\n| task | measure | bare base | PEFT's defaults | softprompt | bag of words |")
    print("| --- | --- | --- | --- | --- | --- |")
    for task, items in found.items():
        cells = [spread([getattr(item, name) for item in items]) for name in ("bare", "peft", "ours")]
        words = items[0].bag_of_words
        print(f"| {task} | {items[0].measure} | {' | '.join(cells)} | {'' if words is None else f'{words:.3f}'} |")
    print(json.dumps({task: [asdict(item) for item in items] for task, items in found.items()}))


def make_tasks(folder: Path, scratch: Path) -> tuple[Task, ...]:
    """The notebook's two sets at its sizes, the quotes again with 200 rows, and SST-2 with 200 rows."""
    prompts, quotes = folder / "awesome-chatgpt-prompts" / "prompts.csv", folder / "english-quotes" / "quotes.jsonl"
    few = TrainConfig(virtual_tokens=4, epochs=6)
    sst2 = DataConfig(
        data=str(sst2_csv(folder / "sst2" / "train.txt", scratch / "train.csv", 200)),
        template=REVIEW_TEMPLATE,
        completion=REVIEW_COMPLETION,
        test=str(sst2_csv(folder / "sst2" / "dev.txt", scratch / "dev.csv", 200)),
    )
    return (
        Task(
            name="role prompts, 50 rows", data=DataConfig(data=str(prompts), text_column="prompt", rows=50), train=few
        ),
        Task(name="quotes, 25 rows", data=DataConfig(data=str(quotes), text_column="quote", rows=25), train=few),
        Task(name="quotes, 200 rows", data=DataConfig(data=str(quotes), text_column="quote", rows=200), train=few),
        Task(name="SST-2, 200 rows", data=sst2, train=TrainConfig(virtual_tokens=20, epochs=10)),
    )


def sst2_csv(source: Path, target: Path, num_rows: int) -> Path:
    """The first rows of each class, in turn, so that both are as many."""
    rows: dict[str, list[str]] = {"0": [], "1": []}
    for line in source.read_text(encoding="utf-8", errors="replace").splitlines():
        label, _, text = line.partition(" ")
        rows[label].append(text)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for pair in list(zip(rows["0"], rows["1"], strict=False))[: num_rows // 2]:
            writer.writerows([[text, SST2_NAMES[label]] for label, text in zip("01", pair, strict=True)])
    return target


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
