"""Prompt tuning in one flat loop, for learning: what `softprompt.train` does, without its care for memory and padding,
and with a plain prompt and linear decay (`reparameterisation="none"`, `schedule="linear"`).

`tests/docs/test_examples.py` shows that it reaches the same losses as `softprompt.train`.

    python examples/flat_loop.py
"""

from __future__ import annotations

import math

import torch

from softprompt import DataConfig, TrainConfig, load_base, read_rows
from softprompt.base import Base
from softprompt.data import build_examples, plan_epoch
from softprompt.embedded import data_file
from softprompt.prompt import StartTexts, starting_tensor
from softprompt.types import ExampleSet


def tune(base: Base, data: ExampleSet, config: TrainConfig) -> tuple[torch.Tensor, list[float]]:
    """The trained prompt [P, H] and the loss of every step, in nats per counted token."""
    texts = [e.ids[e.num_special : len(e.ids) - e.has_eos] for e in data.examples]
    start, _ = starting_tensor(base, config.init, config.virtual_tokens, config.seed, StartTexts(data=texts))
    prompt = start.clone().requires_grad_(True)
    peak = 0.3 * base.embedding_rms
    optimizer = torch.optim.AdamW([prompt], lr=peak, weight_decay=0.0)

    lengths = [len(e.ids) for e in data.examples]
    batches = [
        batch
        for epoch in range(config.epochs)
        for batch in plan_epoch(lengths, batch_rows=config.batch_rows, seed=config.seed, epoch=epoch)
    ]
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / len(batches))  # linear decay to 0
        nats, weight, counted = torch.zeros(()), 0.0, 0
        total = torch.zeros(())
        for example in (data.examples[i] for i in batch):
            ids = torch.tensor(example.ids)
            # The soft prompt stands before everything, BOS included; the base is frozen and only passes gradient on.
            embeds = torch.cat([prompt, base.embed(ids)])[None]
            logits = base.model(inputs_embeds=embeds).logits[0]
            # The vector before a token predicts it: the last virtual token predicts the first token of the text.
            predicting = logits[config.virtual_tokens - 1 : -1]
            each = torch.nn.functional.cross_entropy(predicting, ids, reduction="none")
            weights = torch.tensor(example.target_mask).float()
            nats = nats + (each.detach() * weights).sum()
            counted += sum(example.target_mask)
            if example.has_eos:
                weights[-1] = config.eos_weight
            total = total + (each * weights).sum()
            weight += float(weights.sum())
        optimizer.zero_grad()
        (total / weight).backward()  # summed over the whole step, divided once
        optimizer.step()
        losses.append(float(nats) / counted)
    return prompt.detach(), losses


def main() -> None:
    base = load_base("embedded", dtype="float32")
    config = TrainConfig(virtual_tokens=4, epochs=3)
    rows = read_rows(DataConfig(data=str(data_file("quotes.jsonl")), text_column="quote", rows=25))
    data = build_examples(base, rows, eos=config.eos, max_length=base.max_length - config.virtual_tokens)
    prompt, losses = tune(base, data, config)
    print(f"{prompt.shape[0]} virtual tokens of width {prompt.shape[1]}, base frozen")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token (a uniform guess: {math.log(base.vocab_size):.3f})")


if __name__ == "__main__":
    main()
