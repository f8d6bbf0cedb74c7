"""The error of int8 weights on a real language model: the table of docs/quality.md.

    python benchmarks/int8_quality.py --data ../shared/data                # SmolLM2-135M-Instruct, float32
    python benchmarks/int8_quality.py --cases quotes,answers               # on the package's own rows

Each case compares the base with one whose linear weights and head have the int8 weights' values, with which int8
products agree to the bit. Held-out loss and the likeliest token of each position are of 100 texts that were not trained
on, cut at 128 tokens, bare and behind a soft prompt (P = 4, 25 rows, 2 epochs); answers are greedy, by the engine
itself with and without `weights="int8"`; SST-2 is by label likelihood, under a template.
What was measured is kept in --out and printed again, so that cases can be run one by one; `--cases ""` only prints.
Prints Markdown tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt import (
    Base,
    DataConfig,
    EngineConfig,
    Request,
    SamplingConfig,
    SoftPrompt,
    TrainConfig,
    generate,
    load_base,
    read_rows,
    rows_from_records,
    train,
)
from softprompt.data import Rows, build_examples
from softprompt.data.rows import with_labels
from softprompt.embedded import data_file
from softprompt.evaluation.classification import label_scores, labelled_rows
from softprompt.evaluation.heldout import mean_loss, paired_interval
from softprompt.families import forward_of
from softprompt.families.frozen_linear import linear_weights
from softprompt.families.thin_linear import can_quantise, quantised
from softprompt.loss import RowScore
from softprompt.splice import Row, run_prompts, target_states

CASES = ("quotes", "roles", "answers", "sst2")
NUM_TRAINED, NUM_HELD_OUT, NUM_ANSWERS, NUM_REVIEWS = 25, 100, 20, 200
RECIPE = TrainConfig(virtual_tokens=4, epochs=2)
MAX_TOKENS = 128  # of a text; its end is left out
QUESTION_TOKENS, NEW_TOKENS = 12, 64
AT_ONCE = 10  # texts in one forward
TEMPLATE, COMPLETION = "Review: {text}\nSentiment:", " {label}"
SENTIMENTS = {"0": "negative", "1": "positive"}
Result = dict[str, Any]  # Any: what JSON stores


@dataclass(frozen=True)
class Bench:
    """The base, the one with the int8 weights' values, and where real sets lie."""

    loaded: Base
    rounded: Base
    data: Path | None


def main() -> None:
    flags = parse()
    flags.out.mkdir(parents=True, exist_ok=True)
    file = flags.out / "int8_quality.json"
    results: Result = json.loads(file.read_text()) if file.exists() else {}
    if flags.cases:
        bench = Bench(load_base(flags.base, dtype="float32"), rounded_base(flags.base), flags.data)
    for case in flags.cases:
        began = time.perf_counter()
        results[case] = MEASURE[case](bench, case)
        file.write_text(json.dumps(results, indent=1))
        print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
    print(tables(results))
    print(json.dumps(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--cases", type=lambda text: [name for name in text.split(",") if name], default=[*CASES])
    parser.add_argument("--data", type=Path, help="folder with english-quotes, awesome-chatgpt-prompts and sst2")
    parser.add_argument("--out", type=Path, default=Path("build/int8-quality"))
    flags = parser.parse_args()
    if unknown := set(flags.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if "sst2" in flags.cases and flags.data is None:
        parser.error("the case sst2 needs --data")
    return flags


def rounded_base(name: str) -> Base:
    """The base with each linear weight, and the head (untied), replaced by its int8 values; embeddings stay."""
    base = load_base(name, dtype="float32")
    head: Any = base.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(quantised(head.weight.detach()).dequantised(), requires_grad=False)
    for _, matrix in linear_weights(base.model.base_model):
        if can_quantise(matrix):
            matrix.copy_(quantised(matrix.contiguous()).dequantised())
    return base


def texts_of(bench: Bench, name: str) -> tuple[Rows, Rows]:
    """Rows to train on and held-out ones."""
    own = {"quotes": ("quotes.jsonl", "quote"), "roles": ("coach-prompts.csv", "prompt")}
    real = {"quotes": "english-quotes/quotes.jsonl", "roles": "awesome-chatgpt-prompts/prompts.csv"}
    file, column = own[name]
    source = data_file(file) if bench.data is None else bench.data / real[name]
    rows = read_rows(DataConfig(data=str(source), text_column=column, shuffle=True))
    end = min(NUM_TRAINED + NUM_HELD_OUT, len(rows))
    return rows.select(range(NUM_TRAINED)), rows.select(range(NUM_TRAINED, end))


def compare_losses(bench: Bench, name: str) -> Result:
    """Losses and likeliest tokens of held-out texts, bare and behind a soft prompt."""
    trained, held_out = texts_of(bench, name)
    examples = build_examples(bench.loaded, held_out, eos=False, max_length=MAX_TOKENS).examples
    rows = [(tuple(each.ids), tuple(each.text_mask)) for each in examples]
    prompt = train(bench.loaded, trained, RECIPE).prompt
    return {"bare": score_both(bench, rows, None), "behind a prompt": score_both(bench, rows, prompt.tensor)}


def score_both(bench: Bench, rows: Sequence[tuple[tuple[int, ...], tuple[bool, ...]]], prompt: Tensor | None) -> Result:
    loaded: list[RowScore] = []
    rounded: list[RowScore] = []
    num_same, num_tokens, divergence = 0, 0, 0.0
    for start in range(0, len(rows), AT_ONCE):
        batch = [Row(ids, None if prompt is None else 0, mask) for ids, mask in rows[start : start + AT_ONCE]]
        truth, owners, wanted = log_probs(bench.loaded, batch, prompt)
        found, _, _ = log_probs(bench.rounded, batch, prompt)
        num_tokens += len(wanted)
        num_same += int((truth.argmax(-1) == found.argmax(-1)).sum())
        divergence += float((truth.exp() * (truth - found)).sum())
        for scores, logs in ((loaded, truth), (rounded, found)):
            scores += row_scores(logs, owners, wanted, len(batch))
    interval = paired_interval(rounded, loaded, 0)
    assert interval is not None, rows
    return {
        "rows": len(rows), "tokens": num_tokens, "loaded": mean_loss(loaded), "int8": mean_loss(rounded),
        "interval": [interval.low, interval.high], "same_token": num_same / num_tokens,
        "divergence": divergence / num_tokens,
    }  # fmt: skip


@torch.inference_mode()
def log_probs(base: Base, batch: Sequence[Row], prompt: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, V], the row and the id of each wanted token."""
    forward, prompts = forward_of(base), [] if prompt is None else [prompt]
    prefix = run_prompts(base, forward, prompts) if prompts else None
    hidden, wanted = target_states(base, forward, batch, prompts, prefix)
    return forward.head(hidden).float().log_softmax(-1), wanted.rows, wanted.ids


def row_scores(logs: Tensor, owners: Tensor, wanted: Tensor, num_rows: int) -> list[RowScore]:
    nats = -logs.gather(1, wanted[:, None])[:, 0].double()
    return [RowScore(float(nats[owners == row].sum()), int((owners == row).sum()), 0.0, 0) for row in range(num_rows)]


def compare_answers(bench: Bench, name: str) -> Result:
    """Greedy answers to the beginnings of held-out quotes, bare and behind a soft prompt, by the engine."""
    trained, held_out = texts_of(bench, "quotes")
    examples = build_examples(bench.loaded, held_out, eos=False, max_length=QUESTION_TOKENS).examples
    prompt = train(bench.loaded, trained, RECIPE).prompt
    questions = [tuple(each.ids) for each in examples[:NUM_ANSWERS]]
    return {kind: answers(bench, questions, own) for kind, own in (("bare", None), ("behind a prompt", prompt))}


def answers(bench: Bench, questions: Sequence[tuple[int, ...]], prompt: SoftPrompt | None) -> Result:
    requests = [Request(ids, prompt) for ids in questions]
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    loaded, int8 = (
        generate(bench.loaded, requests, sampling, config=EngineConfig(weights=weights))
        for weights in ("loaded", "int8")
    )
    pairs = [(tuple(mine.ids), tuple(theirs.ids)) for mine, theirs in zip(loaded, int8, strict=True)]
    firsts = sorted(first_difference(*pair) for pair in pairs if pair[0] != pair[1])
    return {"answers": len(pairs), "same": len(pairs) - len(firsts), "first_differences": firsts}


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


def compare_labels(bench: Bench, name: str) -> Result:
    """Accuracy of the bare base on reviews of SST-2's test file."""
    assert bench.data is not None
    lines = (bench.data / "sst2" / "test.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    random.Random(3).shuffle(lines)
    pairs = [line.partition(" ")[::2] for line in lines[:NUM_REVIEWS]]
    records = [{"text": text, "label": SENTIMENTS[label]} for label, text in pairs]
    known = labelled_rows(with_labels(rows_from_records(records, template=TEMPLATE, completion=COMPLETION)))
    guesses = [
        label_scores(base, forward_of(base), known.texts, known.labels, [None])[0].argmax(axis=1).tolist()
        for base in (bench.loaded, bench.rounded)
    ]
    right = [sum(a == b for a, b in zip(found, known.own, strict=True)) for found in guesses]
    changed = sum(a != b for a, b in zip(*guesses, strict=True))
    return {"rows": len(known.own), "loaded": right[0], "int8": right[1], "changed": changed}


MEASURE = {"quotes": compare_losses, "roles": compare_losses, "answers": compare_answers, "sst2": compare_labels}


def tables(results: Result) -> str:
    parts = [loss_table(results), answer_table(results.get("answers", {})), label_table(results.get("sst2"))]
    return "\n\n".join("\n".join(lines) for lines in parts if len(lines) > 2)


def loss_table(results: Result) -> list[str]:
    lines = head("texts", "tokens", "loaded", "int8", "difference, 95 %", "same likeliest token", "KL, nats")
    for case in ("quotes", "roles"):
        for kind, found in results.get(case, {}).items():
            low, high = found["interval"]
            lines.append(
                f"| {found['rows']} {case}, {kind} | {found['tokens']:,} | {found['loaded']:.4f} | {found['int8']:.4f} "
                f"| {found['int8'] - found['loaded']:+.4f} ({low:+.4f} to {high:+.4f}) | {found['same_token']:.1%} "
                f"| {found['divergence']:.4f} |"
            )
    return lines


def answer_table(found: Result) -> list[str]:
    lines = head(f"greedy answers of {NEW_TOKENS} tokens", "equal", "equal tokens at the start of the others")
    for kind, each in found.items():
        firsts = ", ".join(map(str, each["first_differences"]))
        lines.append(f"| {each['answers']}, {kind} | {each['same']} | {firsts} |")
    return lines


def label_table(found: Result | None) -> list[str]:
    lines = head("accuracy", "loaded", "int8", "rows with another label")
    if found:
        loaded, int8 = (found[kind] / found["rows"] for kind in ("loaded", "int8"))
        lines.append(f"| SST-2, {found['rows']} rows, bare | {loaded:.1%} | {int8:.1%} | {found['changed']} |")
    return lines


def head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


if __name__ == "__main__":
    main()
