"""A training step and a decode step of this commit beside those of another, in turn.

    git worktree add ../old COMMIT && (build the C extension there, or copy it from here)
    python benchmarks/before_after.py ../old/src
    python benchmarks/before_after.py ../old/src --shape embedded --rounds 6

Each round runs one child process per commit, in alternating order; loading and the first steps are not timed. Prints
the medians over rounds and the ratios new / old; the last line is JSON. `smollm2` is SmolLM2-135M's shape with seeded
random weights, float32; `embedded` is the base that the package carries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

NUM_STEPS, NUM_TOKENS = 12, 40
CHILD = "--child"


def measure(shape: str) -> dict[str, float]:
    """Milliseconds: the median training step of 8 rows, the median decode step of 1 and of 16 rows."""
    from softprompt.config import SamplingConfig, TrainConfig
    from softprompt.data import rows_from_texts
    from softprompt.engine import Engine, Request
    from softprompt.training import StepDone, train

    base = make_base(shape)
    texts = [f"Row {number}: " + "light and water, stone and wind, " * 6 for number in range(8)]
    times: list[float] = []
    config = TrainConfig(virtual_tokens=4, batch_rows=8, max_steps=NUM_STEPS, epochs=NUM_STEPS)

    def sink(event: object) -> None:
        if isinstance(event, StepDone):
            times.append(time.perf_counter())

    result = train(base, rows_from_texts(texts), config, sink=sink)
    found = {"training step": 1000 * median_gap(times[2:])}
    for num_rows in (1, 16):
        engine = Engine(base)
        sampling = SamplingConfig(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
        for number in range(num_rows):
            ids = base.bos_ids + base.encode(f"Row {number}: light and water")
            engine.add(Request(ids=ids, prompt=result.prompt, sampling=sampling))
        times = []
        while engine.step():
            times.append(time.perf_counter())
        found[f"decode step, {num_rows} rows"] = 1000 * median_gap(times[4:])
    return found


def median_gap(times: list[float]) -> float:
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def make_base(shape: str):  # type: ignore[no-untyped-def]
    from softprompt.base import freeze_base, load_base
    from softprompt.embedded import base_folder

    embedded = load_base(str(base_folder()), dtype="float32", device="cpu")
    if shape == "embedded":
        return embedded
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2_048,
    )  # fmt: skip
    return freeze_base(LlamaForCausalLM(config), embedded.tokenizer, name=shape)


def run_child(source: Path, shape: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, CHILD, "--shape", shape]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the folder `src` of the other commit")
    parser.add_argument("--shape", choices=("smollm2", "embedded"), default="smollm2")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.shape)))
        return
    sources = {"old": asked.old.resolve(), "new": Path(__file__).parents[1] / "src"}
    runs: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for number in range(asked.rounds):
        for name in list(sources)[:: 1 if number % 2 else -1]:
            runs[name].append(run_child(sources[name], asked.shape))
    print("| ms, median of rounds | old | new | new / old |\n| --- | --- | --- | --- |")
    table = {}
    for key in runs["old"][0]:
        old, new = (statistics.median(run[key] for run in runs[name]) for name in ("old", "new"))
        table[key] = {"old": old, "new": new, "ratio": new / old}
        print(f"| {key} | {old:.2f} | {new:.2f} | {new / old:.3f} |")
    print(json.dumps({"shape": asked.shape, "rounds": runs, "medians": table}))


if __name__ == "__main__":
    main()
