"""Forward and backward passes of an encoder behind a soft prompt: rows packed, against the same rows padded and masked.

    python benchmarks/encoder_layouts.py [--hidden 384 --layers 6 --heads 12] [--dtype float32]

Seeded BERTs without training; rows of 5 to 60 tokens, as long as those of SST-2 on average; states at [CLS]. Contenders
take turns in one process; best of the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from softprompt.base import Base, freeze_base
from softprompt.families import Forward, Packing, forward_of
from softprompt.splice import Row, column_states

VOCAB, NUM_STEPS = 3_000, 6


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 384), ("layers", 6), ("heads", 12), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = tiny_bert(options)
    found = [compare(base, options.rounds, rows, virtual) for rows in (8, 32) for virtual in (4, 20)]
    print(json.dumps({"shape": vars(options), "cases": found}))


def tiny_bert(options: argparse.Namespace) -> Base:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    model = BertForMaskedLM(config).to(getattr(torch, options.dtype))
    return freeze_base(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0"), name="seeded BERT")


def compare(base: Base, rounds: int, num_rows: int, num_virtual: int) -> dict[str, float]:
    packed = forward_of(base)
    padded = replace(packed, packing=Packing(None, "for this comparison"))
    draw = random.Random(0)
    lengths = [max(5, min(60, int(draw.lognormvariate(3.0, 0.55)))) for _ in range(num_rows * NUM_STEPS)]
    rows = [Row([draw.randrange(5, VOCAB) for _ in range(n)], 0, columns=(0,), num_before=1) for n in lengths]
    steps = [rows[first : first + num_rows] for first in range(0, len(rows), num_rows)]
    prompt = (torch.randn(num_virtual, base.hidden_size) * base.embedding_rms).requires_grad_(True)
    times: dict[str, list[float]] = {"packed": [], "padded": []}
    for _ in range(rounds + 1):  # the first is thrown away
        for name, forward in (("packed", packed), ("padded", padded)):
            times[name].append(seconds(base, forward, steps, prompt))
    best = {name: min(own[1:]) for name, own in times.items()}
    slots = sum(len(step) * (num_virtual + max(len(row.ids) for row in step)) for step in steps)
    case = {
        "rows": num_rows, "virtual_tokens": num_virtual, "packed_s": round(best["packed"], 4),
        "padded_s": round(best["padded"], 4), "ratio": round(best["padded"] / best["packed"], 2),
        "share_of_real_tokens": round((sum(lengths) + num_virtual * len(rows)) / slots, 2),
    }  # fmt: skip
    print(case, flush=True)
    return case


def seconds(base: Base, forward: Forward, steps: Sequence[Sequence[Row]], prompt: torch.Tensor) -> float:
    started = time.perf_counter()
    for step in steps:
        states, _ = column_states(base, forward, step, [prompt])
        states.float().square().sum().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
