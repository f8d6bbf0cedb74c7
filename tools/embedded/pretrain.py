"""Make the embedded base: write the text, learn its tokens, pretrain a small Bloom on two CPU cores, store it.

    python tools/embedded/pretrain.py                       # the shipped base
    python tools/embedded/pretrain.py --steps 1000 --out /tmp/base   # a quick one

One process per core, one thread each, gradients summed once per step: on a shared machine that is several times faster
than one process with two threads. The last line printed is JSON: steps, wall time, tokens, the last loss and the loss
on a shard that was not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from lean import loss_sum
from torch import Tensor
from torch.multiprocessing import get_context, spawn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from vocabulary import train_tokenizer
from writer.corpus import NUM_SHARDS, SEED, corpus, shard
from writer.documents import name_places
from writer.feelings import BOTH_HANDS, LOOSE_TALK

FOLDER = Path(__file__).parents[2] / "src" / "softprompt" / "embedded" / "base"
NUM_TOKENIZER_SHARDS = 10
NUM_VALIDATION_BATCHES = 20
LENGTH_STEP = 8

Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the run."""

    steps: int = 2400  # optimiser steps
    stop: int = 0  # the step after which to end early, whatever the rates; 0: at the end
    workers: int = 2  # processes, one thread each
    batch_tokens: int = 2048  # tokens of one worker's part of a batch at most, pads included
    cut_share: float = 0.0  # documents whose tokens are made in two parts
    max_tokens: int = 192  # tokens of one document at most; longer ones are cut
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    matrix_rate: float = 0.02  # Muon, the layers' matrices
    other_rate: float = 3e-3  # AdamW, embeddings, norms and biases
    warmup: int = 40  # steps
    name_weight: float = 1.0  # what the first token of a verdict's or category's name weighs in the loss
    decay: float = 0.6  # share of the steps, at the end, over which the rate falls to zero
    num_shards: int = NUM_SHARDS
    seed: int = SEED
    loose: bool = True  # whether reviews use the words positive and negative, loosely
    start: str = ""  # folder of a base to train on; empty: random weights and a new tokenizer


# At first every token weighs the same; then the names of verdicts, one token in eighty, weigh more; the last stage also
# shows texts whose tokens were made in two parts, and positive and negative in reviews: with these from the start, in
# one stage of 2,600 steps, no soft prompt could make them name a review's side (docs/log.md).
STAGES = (
    Plan(steps=2400, stop=900, loose=False),
    Plan(steps=1800, stop=750, name_weight=12.0, decay=0.7, loose=False),
    Plan(steps=650, name_weight=12.0, decay=0.8, cut_share=0.1),
)


@dataclass(frozen=True)
class Rows:
    """Documents as ids: row i is `ids[starts[i] : starts[i + 1]]`. Tensors, so that processes share them."""

    ids: Tensor
    names: Tensor  # whether an id begins the name of a verdict or category
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[part].long(), self.names[part]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], plan: Plan) -> Rows:
    """Each document's ids with EOS at its end, or cut without one."""
    eos, ids, names, starts, documents = tokenizer.eos_token_id, [], [], [0], list(texts)
    cuts = [_cut(text, plan, Random(f"{plan.seed}-cut-{index}")) for index, text in enumerate(documents)]
    heads = tokenizer.backend_tokenizer.encode_batch([text[:cut] for text, cut in zip(documents, cuts, strict=True)])
    for text, cut, head in zip(documents, cuts, heads, strict=True):
        named = {head.char_to_token(place) for place in name_places(text) if place < cut}
        tail = tokenizer.backend_tokenizer.encode(text[cut:]).ids if cut < len(text) else []
        ids.extend([*head.ids, *tail, eos][: plan.max_tokens])
        names.extend(token in named for token in range(len(ids) - starts[-1]))
        starts.append(len(ids))
    return Rows(torch.tensor(ids, dtype=torch.int16), torch.tensor(names), torch.tensor(starts))


def _cut(text: str, plan: Plan, rng: Random) -> int:
    """Where a document is cut in two before its tokens are made: its end, or at times after the space after a sentence.

    An input that ends in a space ends in a token that whole documents never have there.
    """
    if rng.random() >= plan.cut_share:
        return len(text)
    return rng.choice([match.end() for match in re.finditer(r"[.?!:] (?=\S)", text)] or [len(text)])


def batches(rows: Rows, batch_tokens: int, rng: Random) -> Iterator[list[int]]:
    """Endless batches of rows of like length, in an order drawn anew for each pass; odd rows sit it out."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(rows.starts.diff().tolist()):
        by_length.setdefault(_padded(length), []).append(index)
    while True:
        cut = []
        for length, indices in sorted(by_length.items()):
            rng.shuffle(indices)
            num_rows = batch_tokens // length
            cut += [indices[start : start + num_rows] for start in range(0, len(indices) - num_rows + 1, num_rows)]
        rng.shuffle(cut)
        yield from cut


def _padded(length: int) -> int:
    """Rounded up: few distinct shapes, because oneDNN prepares kernels for each new one."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def batch_loss(
    model: BloomForCausalLM, rows: Rows, indices: list[int], name_weight: float = 1.0
) -> tuple[Tensor, float]:
    """Weighted sum of the negative log-likelihood of every token that has a predecessor, and the sum of the weights."""
    picked = [rows.row(index) for index in indices]
    longest = _padded(max(len(ids) for ids, _ in picked))
    ids, weights = torch.zeros(len(picked), longest, dtype=torch.long), torch.zeros(len(picked), longest)
    for place, (row, names) in enumerate(picked):
        ids[place, : len(row)] = row
        weights[place, : len(row)] = torch.where(names, name_weight, 1.0)
    return loss_sum(model, ids, weights), float(weights[:, 1:].sum())


def build_model(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> BloomForCausalLM:
    """A Bloom with random weights, or the one that the plan starts from."""
    if plan.start:
        return BloomForCausalLM.from_pretrained(plan.start, dtype=torch.float32)
    torch.manual_seed(plan.seed)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden,
        n_layer=plan.layers,
        n_head=plan.heads,
        unk_token_id=tokenizer.unk_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BloomForCausalLM(config)


def build_optimizers(model: BloomForCausalLM, plan: Plan) -> Optimizers:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices = [parameter for parameter in model.transformer.h.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def set_rates(optimizers: Optimizers, step: int, plan: Plan) -> None:
    """Warm-up, flat, linear decay to zero."""
    flat_end = plan.steps * (1 - plan.decay)
    share = min((step + 1) / plan.warmup, 1.0)
    if step > flat_end:
        share *= (plan.steps - step) / (plan.steps - flat_end)
    for optimizer, full in zip(optimizers, (plan.matrix_rate, plan.other_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = full * share


class Exchange:
    """Sums the workers' gradients, loss and token counts through shared memory."""

    def __init__(self, num_numbers: int, workers: int) -> None:
        self.numbers = torch.zeros(workers, num_numbers + 2).share_memory_()
        self.barrier = get_context("spawn").Barrier(workers)

    def mean(self, rank: int, gradients: list[Tensor], loss: float, weight: float) -> float:
        """Put the gradients of the mean loss of all workers' tokens in place; gives that loss."""
        self.numbers[rank] = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([loss, weight])])
        self.barrier.wait()
        total = self.numbers.sum(0)
        self.barrier.wait()
        start, num_all = 0, total[-1]
        for gradient in gradients:
            gradient.copy_((total[start : start + gradient.numel()] / num_all).view_as(gradient))
            start += gradient.numel()
        return float(total[-2] / num_all)


def train(
    model: BloomForCausalLM, rows: Rows, plan: Plan, rank: int, exchange: Exchange
) -> Iterator[tuple[int, float]]:
    """Train in place; gives each step's number and loss."""
    optimizers, parameters = build_optimizers(model, plan), list(model.parameters())
    source = batches(rows, plan.batch_tokens, Random(f"{plan.seed}-on" if plan.start else plan.seed))
    for step in range(plan.stop or plan.steps):
        set_rates(optimizers, step, plan)
        shares = [next(source) for _ in range(plan.workers)]
        loss, weight = batch_loss(model, rows, shares[rank], plan.name_weight)
        loss.backward()
        mean = exchange.mean(rank, [parameter.grad for parameter in parameters], loss.item(), weight)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield step, mean


@torch.no_grad()
def validation_loss(model: BloomForCausalLM, rows: Rows, plan: Plan) -> float:
    """The mean loss per token of some batches of a shard that is not trained on."""
    source = batches(rows, plan.batch_tokens, Random(0))
    results = [batch_loss(model, rows, next(source)) for _ in range(NUM_VALIDATION_BATCHES)]
    return sum(loss.item() for loss, _ in results) / sum(weight for _, weight in results)


def save(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder in bfloat16; it replaces an older one in one move."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    copy = BloomForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).eval().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def work(
    rank: int, rows: Rows, tokenizer_folder: str, plan: Plan, out: Path, save_every: int, exchange: Exchange
) -> None:
    """One worker's run; the first one speaks and writes."""
    torch.set_num_threads(1)
    started = time.monotonic()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    model, recent = build_model(tokenizer, plan), math.log(len(tokenizer))
    for step, loss in train(model, rows, plan, rank, exchange):
        recent += 0.02 * (loss - recent)
        if rank == 0 and step % 50 == 49:
            print(f"step {step + 1} loss {recent:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if rank == 0 and save_every and step % save_every == save_every - 1:
            save(model, tokenizer, out)
    if rank == 0:
        save(model, tokenizer, out)
        unseen = validation_loss(model, encode(tokenizer, shard(plan.num_shards, plan.seed), plan), plan)
        result = {
            "steps": plan.stop or plan.steps,
            "wall_s": round(time.monotonic() - started),
            "loss": recent,
            "loss_unseen": unseen,
        }
        print(json.dumps(result), flush=True)


def run(plan: Plan, out: Path, save_every: int) -> None:
    """One stage, from the text to the folder."""
    started = time.monotonic()
    if plan.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(plan.start)
    else:
        tokenizer = train_tokenizer(corpus(plan.seed, NUM_TOKENIZER_SHARDS))
    rows = encode(tokenizer, corpus(plan.seed, plan.num_shards, LOOSE_TALK if plan.loose else BOTH_HANDS), plan)
    num_parameters = build_model(tokenizer, plan).num_parameters()
    counts = f"{len(rows)} documents, {len(rows.ids)} tokens, {num_parameters} parameters"
    print(f"{counts}, ready after {time.monotonic() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        tokenizer.save_pretrained(tokenizer_folder)
        exchange = Exchange(num_parameters, plan.workers)
        spawn(work, (rows, tokenizer_folder, plan, out, save_every, exchange), nprocs=plan.workers)


def _parse() -> tuple[tuple[Plan, ...], Path, int]:
    """The stages of the shipped base, or the single one that the flags describe once --steps is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints at OUT; 0: only the end")
    given = vars(parser.parse_args())
    out, save_every = given.pop("out"), given.pop("save_every")
    if given and "steps" not in given:
        parser.error("a stage of your own needs --steps; without any flag the three stages of the shipped base are run")
    return (Plan(**given),) if given else STAGES, out, save_every


def main() -> None:
    plans, out, save_every = _parse()
    torch.set_num_threads(1)
    for index, plan in enumerate(plans):
        run(replace(plan, start=str(out)) if index else plan, out, save_every)


if __name__ == "__main__":
    main()
