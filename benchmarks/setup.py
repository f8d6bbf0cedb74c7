"""Where the time of a whole training goes, from the start of the process to its end: imports, load, set-up, steps, end.

    python benchmarks/setup.py                        # the embedded base
    python benchmarks/setup.py --base smollm2 --dtype float32 --epochs 1 --rounds 3
    python benchmarks/setup.py ../old/src             # beside another commit's, in turn

One process per round, and one more that only imports torch and transformers. Rows are the embedded coaching prompts.
"set-up" is everything between the loaded base and the first step: fingerprint, check of the base, rows, memory. Prints
the medians over rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD, BEGAN = "--child", "SETUP_BENCHMARK_BEGAN"
OURS = Path(__file__).parents[1] / "src"
FIRST = "first step"
SETUP = ("fingerprint", "embedding RMS", "check of the base", "rows, plan, memory")


class Marks:
    """Seconds between one mark and the next, the first counted from the start of the process."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._last = float(os.environ[BEGAN])

    def __call__(self, name: str) -> None:
        now = time.time()
        self.found[name] = self.found.get(name, 0.0) + now - self._last
        self._last = now


def child(asked: argparse.Namespace) -> None:
    mark = Marks()
    mark("python")
    import torch  # noqa: F401

    mark("import torch")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    mark("import transformers")
    from softprompt import DataConfig, TrainConfig, load_base, save_prompt, split_rows, train

    mark("import softprompt")
    import transformers.modeling_utils  # noqa: F401

    mark("transformers' model code")
    base = load_base(asked.base, dtype=asked.dtype, device="cpu")
    mark("load")
    _ = base.fingerprint
    mark(SETUP[0])
    _ = base.embedding_rms
    mark(SETUP[1])
    from softprompt.embedded import data_file
    from softprompt.families import forward_of
    from softprompt.training import StepDone

    forward_of(base)
    mark(SETUP[2])
    data = DataConfig(data=str(data_file("coach-prompts.csv")), text_column="prompt", validation=0.1)
    split = split_rows(data, seed=0)

    def sink(event: object) -> None:
        is_first = FIRST not in mark.found
        if not is_first or isinstance(event, StepDone):
            mark(FIRST if is_first else "later steps and validation")

    config = TrainConfig(virtual_tokens=4, epochs=asked.epochs, batch_rows=8)
    result = train(
        base, split.train, config, validation=split.validation, sink=sink, prepared=lambda ready: mark(SETUP[3])
    )
    mark("result")
    with tempfile.TemporaryDirectory() as folder:
        save_prompt(result.prompt, Path(folder) / "prompt")
    mark("save")
    print(json.dumps({**mark.found, "ended": time.time()}))


def run_child(source: Path, asked: argparse.Namespace) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", BEGAN: repr(time.time())}
    flags = ["--base", asked.base, "--dtype", asked.dtype, "--epochs", str(asked.epochs)]
    done = subprocess.run([sys.executable, __file__, CHILD, *flags], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["exit"] = time.time() - found.pop("ended")
    found["total"] = sum(found.values())
    found["set-up"] = sum(found[name] for name in SETUP)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the folder `src` of another commit")
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked)
        return
    sources = {"new": OURS} if asked.old is None else {"old": asked.old.resolve(), "new": OURS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    for number in range(asked.rounds):
        for name in list(sources)[:: 1 if number % 2 else -1]:
            runs[name].append(run_child(sources[name], asked))
    medians = {
        name: {part: statistics.median(run[part] for run in found) for part in found[0]} for name, found in runs.items()
    }
    print(f"| seconds, median of {asked.rounds} | {' | '.join(medians)} |\n| --- |{' --- |' * len(medians)}")
    for part in medians["new"]:
        print(f"| {part} | {' | '.join(f'{found[part]:.2f}' for found in medians.values())} |")
    shares = {name: found["set-up"] / found["total"] for name, found in medians.items()}
    print("set-up is " + ", ".join(f"{share:.1%} of the process ({name})" for name, share in shares.items()))
    print(json.dumps({"base": asked.base, "dtype": asked.dtype, "medians": medians, "shares": shares, "rounds": runs}))


if __name__ == "__main__":
    main()
