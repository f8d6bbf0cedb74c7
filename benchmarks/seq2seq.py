"""Soft prompts on a tiny T5: trained, compared, generated and served.

    python tools/embedded/pretrain_t5.py --out /tmp/tiny-t5
    python benchmarks/seq2seq.py /tmp/tiny-t5

The base goes on from the beginning of a sentence, unless a task's name stands before it. Here no name does: a soft
prompt trained on 100 pairs takes its place, once for the encoder alone, once for both sides. Beside it stand the bare
base, and the bare base with the task's own name, which is what it was pretrained on. `reviews` is no task of its
pretraining: the package's product reviews, whose labels it never wrote. Figures are on 100 rows that neither saw: nats
per token, and answers that are right word for word. The served answers are compared with the engine's. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from softprompt import Base, SamplingConfig, SoftPrompt, TrainConfig, load_base, save_prompt
from softprompt.data import Rows, build_examples, form_ids, rows_from_records
from softprompt.embedded import data_file
from softprompt.engine import Request, generate
from softprompt.evaluation.heldout import held_out_losses
from softprompt.families import forward_of
from softprompt.training import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "embedded"))
from pretrain_t5 import NAMED

NUM_ROWS, NUM_TEST, SEEDS = 100, 100, (2_000, 3_000)  # of the sentences to train on, and to test on
FORM = {"template": "{text}", "completion": "{answer}"}
SAMPLING = SamplingConfig(max_new_tokens=12)
TASKS = (*NAMED, "reviews")


def rows_of(task: str, is_test: bool, count: int, named: bool = False) -> Rows:
    """Pairs of one task; `named` puts the task's name before the text."""
    before = f"{task}: " if named else ""
    return rows_from_records(
        [{"text": before + text, "answer": answer} for text, answer in _pairs(task, is_test, count)], **FORM
    )


def _pairs(task: str, is_test: bool, count: int) -> list[tuple[str, str]]:
    if task == "reviews":
        with open(data_file(f"reviews{'-heldout' if is_test else ''}.csv"), encoding="utf-8", newline="") as file:
            return [(row["text"], row["label"]) for row in csv.DictReader(file)][:count]
    random = Random(SEEDS[is_test])
    return [tuple(NAMED[task](random)) for _ in range(count)]


def answers_of(base: Base, rows: Rows, prompt: SoftPrompt | None) -> list[str]:
    requests = [Request(form_ids(base, rows.form, {"text": record["text"]}), prompt) for record in rows.records]
    return [answer.text.strip() for answer in generate(base, requests, SAMPLING)]


def figures(base: Base, rows: Rows, prompt: SoftPrompt | None) -> dict[str, float]:
    """Nats per token, and the share of answers that are right."""
    examples = build_examples(base, rows, eos=True, max_length=200)
    found = held_out_losses(base, forward_of(base), {} if prompt is None else {"prompt": prompt}, {"test": examples})
    answers = answers_of(base, rows, prompt)
    right = [answer == record["answer"] for answer, record in zip(answers, rows.records, strict=True)]
    return {"nats": round(found[-1].loss, 4), "right": sum(right) / len(right)}


def run(base: Base, settings: TrainConfig) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, SoftPrompt]]:
    """Figures by task and contender, and the prompts of the encoder by task."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    prompts = {}
    for task in TASKS:
        test = rows_of(task, True, NUM_TEST)
        results[task] = {
            "bare": figures(base, test, None),
            "named": figures(base, rows_of(task, True, NUM_TEST, named=True), None),
        }
        for name, config in (("prompt", settings), ("both sides", replace(settings, decoder_prompt=True))):
            began = time.perf_counter()
            prompt = train(base, rows_of(task, False, NUM_ROWS), config).prompt
            seconds = round(time.perf_counter() - began, 1)
            results[task][name] = {**figures(base, test, prompt), "seconds": seconds}
            prompts.setdefault(task, prompt)
        print(task, json.dumps(results[task]), flush=True)
    return results, prompts


@contextmanager
def server(base: Path, library: Path, folder: Path) -> Iterator[str]:
    """The URL of `softprompt serve` on that base and library."""
    command = [sys.executable, "-m", "softprompt", "serve", "--base", str(base), "--dtype", "float32",
               "--library", str(library), "--state", str(folder / "state"), "--port", "0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split("/v1")[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


def served(url: str, model: str, texts: Sequence[str]) -> list[str]:
    body = {"model": model, "prompt": list(texts), "max_tokens": SAMPLING.max_new_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return [choice["text"].strip() for choice in json.load(response)["choices"]]


def serve_check(base: Base, folder: Path, prompts: Mapping[str, SoftPrompt]) -> dict[str, float]:
    """The share of answers over HTTP that are the engine's, for each prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "library"
        names = {task: task.replace(" ", "-") for task in prompts}
        for task, prompt in prompts.items():
            save_prompt(prompt, library / names[task])
        same = {}
        with server(folder, library, Path(scratch)) as url:
            for task, prompt in prompts.items():
                rows = rows_of(task, True, 20)
                texts = [record["text"] for record in rows.records]
                pairs = zip(served(url, names[task], texts), answers_of(base, rows, prompt), strict=True)
                same[task] = sum(ours == theirs for ours, theirs in pairs) / len(texts)
        return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path, help="folder that tools/embedded/pretrain_t5.py wrote")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--virtual-tokens", type=int, default=8)
    asked = parser.parse_args()
    base = load_base(str(asked.base), dtype="float32", device="cpu")
    results, prompts = run(base, TrainConfig(virtual_tokens=asked.virtual_tokens, epochs=asked.epochs))
    example = _pairs("subject", True, 1)[0][0]
    rows = rows_from_records([{"text": example, "answer": "?"}], **FORM)
    shown = {name: answers_of(base, rows, prompt)[0] for name, prompt in {"bare": None, **prompts}.items()}
    print(json.dumps({"text": example, "answers": shown}))
    print(json.dumps({
        "figures": results, "served_as_generated": serve_check(base, asked.base, prompts), "answers": shown,
        "rows": NUM_ROWS, "processor": platform.processor() or platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
