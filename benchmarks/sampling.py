"""The sampler beside a full sort and `torch.topk`: one step's tokens of 16 rows, in turn.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --vocab 32000 --rows 4 --rounds 9

The peers keep the tokens that top-k and top-p keep and draw from them, as transformers' warpers and vLLM's native
sampler do: with a sort of all logits, or with `torch.topk` of 1,024 and a sort behind it where those hold top-p's mass.
Medians over the rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from softprompt.base import Base, load_base
from softprompt.config import SamplingConfig
from softprompt.engine.sampler import Sampler

NUM_TOP = 1024  # of the peer with torch.topk
CASES = {  # name: how peaked the logits are, and the settings
    "top-p 0.9, peaked logits": (6.0, {"top_p": 0.9}),
    "top-p 0.9, flat logits": (1.0, {"top_p": 0.9}),
    "top-k 50": (6.0, {"top_k": 50}),
}


def product(base: Base, logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Callable[[], object]:
    sampler = Sampler(base)
    settings = SamplingConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    states = [sampler.new_state(settings, (5,), row) for row in range(len(logits_BV))]
    return lambda: sampler.sample(logits_BV, states, [None] * len(states))


def drawn(sorted_BC: Tensor, ids_BC: Tensor, top_k: int, top_p: float, sums_B1: Tensor | None = None) -> Tensor:
    """A token of each row of logits in falling order."""
    weights_BC = torch.exp(sorted_BC - sorted_BC[:, :1])
    total_B1 = weights_BC.sum(-1, keepdim=True) if sums_B1 is None else sums_B1
    before_BC = (weights_BC / total_B1).cumsum(-1) - weights_BC / total_B1
    weights_BC = weights_BC.masked_fill(before_BC >= top_p, 0.0)
    if top_k:
        weights_BC[:, top_k:] = 0
    return ids_BC.gather(1, torch.multinomial(weights_BC, 1))


def full_sort(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    return drawn(*logits_BV.sort(descending=True), top_k, top_p)


def topk(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    values_BC, ids_BC = logits_BV.topk(top_k or NUM_TOP)
    if top_k:
        return drawn(values_BC, ids_BC, top_k, top_p)
    sums_B1 = torch.exp(logits_BV - values_BC[:, :1]).sum(-1, keepdim=True)
    holds_enough = torch.exp(values_BC - values_BC[:, :1]).sum(-1, keepdim=True) >= top_p * sums_B1
    return drawn(values_BC, ids_BC, top_k, top_p, sums_B1) if holds_enough.all() else full_sort(logits_BV, top_k, top_p)


def median_ms(call: Callable[[], object], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=250_880)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base, found = load_base("embedded"), {}
    print(
        f"{options.rows} rows of {options.vocab:,} logits, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("\n| case | softprompt | full sort | `torch.topk` |\n| --- | --- | --- | --- |")
    for name, (scale, settings) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        logits_BV = scale * torch.randn(options.rows, options.vocab, generator=generator)
        calls = (
            product(base, logits_BV, **settings),
            lambda logits=logits_BV, own=settings: full_sort(logits, **own),
            lambda logits=logits_BV, own=settings: topk(logits, **own),
        )
        found[name] = [median_ms(call, options.rounds) for call in calls]
        print(f"| {name} | " + " | ".join(f"{value:,.0f} ms" for value in found[name]) + " |")
    print(json.dumps({"rows": options.rows, "vocab": options.vocab, "ms": found}))


if __name__ == "__main__":
    main()
