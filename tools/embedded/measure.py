"""What the embedded base shows: held-out loss and accuracy, bare and with soft prompts, in plain PyTorch.

    python tools/embedded/measure.py [--base FOLDER] [--seeds 3]

It shares no code with the package, so it also checks the package's own figures. Soft prompt, then text; no BOS, no EOS.
The last line printed is JSON. Shapes: B batch, T tokens, P prompt length, H hidden.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from pretrain import FOLDER
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from writer.corpus import SEED
from writer.shipped import LABELS, Row, shipped_sets

BATCH_SIZE, NUM_TEXT_ROWS, TEXT_P, REVIEW_P = 8, 50, 8, 20
FORM = "Review: {text}\nSentiment:"
WRITTEN = (
    FORM,
    "{text}\nIs this review positive or negative? Answer:",
    "Say positive when the buyer is happy, negative when the buyer is unhappy.\nReview: {text}\nSentiment:",
    "Label the review as positive or negative.\nReview: {text}\nLabel:",
    "{text} All in all, my feeling about it is",
)


class Recipe(NamedTuple):
    prompt_length: int
    epochs: int
    rate: float  # absolute
    peft_start: bool  # N(0, 1) instead of embeddings of tokens of the training text


class Item(NamedTuple):
    ids: list[int]
    start: int  # the first counted token


class Base:
    """The frozen model, its tokenizer and what is asked of them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.table = self.model.get_input_embeddings().weight
        self.rms = self.table.pow(2).mean().sqrt().item()
        self.nothing = torch.zeros(0, self.table.shape[1])

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def loss_sums(self, prompt_PH: Tensor, items: Sequence[Item]) -> tuple[Tensor, int]:
        """Each item's summed negative log-likelihood, [B], and the number of counted tokens of all."""
        longest, length = max(len(item.ids) for item in items), len(prompt_PH)
        ids_BT = torch.tensor([item.ids + [0] * (longest - len(item.ids)) for item in items])
        mask = torch.tensor([[1] * (length + len(item.ids)) + [0] * (longest - len(item.ids)) for item in items])
        places = torch.arange(longest)
        ends = torch.tensor([[item.start, len(item.ids)] for item in items])
        counted = (places >= ends[:, :1]) & (places < ends[:, 1:])
        embeds = torch.cat([prompt_PH.expand(len(items), -1, -1), self.table[ids_BT]], dim=1)
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        first = 0 if length else 1  # a first token without a predecessor is never counted
        scores = logits[:, length + first - 1 : -1].log_softmax(-1)
        losses = -scores.gather(-1, ids_BT[:, first:, None])[..., 0] * counted[:, first:]
        return losses.sum(1), int(counted.sum())

    @torch.no_grad()
    def loss(self, prompt_PH: Tensor, items: Sequence[Item]) -> float:
        """Mean over all counted tokens."""
        sums = [self.loss_sums(prompt_PH, items[start : start + 50]) for start in range(0, len(items), 50)]
        return sum(losses.sum().item() for losses, _ in sums) / sum(num_tokens for _, num_tokens in sums)

    def accuracy(self, prompt_PH: Tensor, rows: Sequence[Row], form: str) -> float:
        """The share of rows whose own label is the likelier one."""
        return _share_right(self.leaning(prompt_PH, rows, form) > 0, rows)

    def accuracy_at_median(self, prompt_PH: Tensor, rows: Sequence[Row], form: str) -> float:
        """The same, with the first label above the rows' median leaning: about what calibration could make of it."""
        leaning = self.leaning(prompt_PH, rows, form)
        return _share_right(leaning > leaning.median(), rows)

    @torch.no_grad()
    def leaning(self, prompt_PH: Tensor, rows: Sequence[Row], form: str) -> Tensor:
        """For each row [B], how much likelier the first label is than the second, in nats."""
        scores = []
        for label in LABELS:
            items = [self.labelled(row, form, label) for row in rows]
            parts = [self.loss_sums(prompt_PH, items[start : start + 50])[0] for start in range(0, len(items), 50)]
            scores.append(torch.cat(parts))
        return scores[1] - scores[0]

    def labelled(self, row: Row, form: str, label: str) -> Item:
        ids = self.ids(form.format(text=row["text"]))
        return Item(ids + self.ids(f" {label}"), len(ids))

    def start(self, items: Sequence[Item], recipe: Recipe, seed: int) -> Tensor:
        if recipe.peft_start:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(recipe.prompt_length, self.table.shape[1], generator=generator)
        tokens = [token for item in items for token in item.ids]
        return self.table[torch.tensor(Random(seed).choices(tokens, k=recipe.prompt_length))].clone()

    def train(self, items: Sequence[Item], recipe: Recipe, seed: int) -> Tensor:
        """A soft prompt: AdamW, linear decay to zero, no weight decay."""
        prompt, rng = self.start(items, recipe, seed).requires_grad_(True), Random(seed)
        optimizer = torch.optim.AdamW([prompt], lr=recipe.rate, weight_decay=0.0)
        num_steps = recipe.epochs * math.ceil(len(items) / BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
        for _ in range(recipe.epochs):
            order = rng.sample(items, len(items))
            for start in range(0, len(order), BATCH_SIZE):
                losses, num_tokens = self.loss_sums(prompt, order[start : start + BATCH_SIZE])
                (losses.sum() / num_tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return prompt.detach()


def _share_right(is_first: Tensor, rows: Sequence[Row]) -> float:
    chosen = [LABELS[0] if first else LABELS[1] for first in is_first.tolist()]
    return sum(label == row["label"] for label, row in zip(chosen, rows, strict=True)) / len(rows)


def over_seeds(
    base: Base, items: Sequence[Item], recipe: Recipe, seeds: int, score: Callable[[Tensor], float]
) -> list[float]:
    """The score of a prompt trained with each seed; prints them with the seconds of one run."""
    started, scores = time.monotonic(), []
    for seed in range(seeds):
        scores.append(round(score(base.train(items, recipe, seed)), 4))
    print(f"  {recipe} {scores} {(time.monotonic() - started) / seeds:.1f} s each", flush=True)
    return scores


def measure_text(base: Base, training: list[Row], heldout: list[Row], column: str, seeds: int) -> dict[str, object]:
    """Held-out loss: bare, after our recipe, after PEFT's defaults."""
    items = [Item(base.ids(str(row[column])), 0) for row in training[:NUM_TEXT_ROWS]]
    unseen = [Item(base.ids(str(row[column])), 1) for row in heldout]
    bare = base.loss(base.nothing, unseen)
    print(f"{column}: bare {bare:.4f}")
    ours, peft = Recipe(TEXT_P, 6, base.rms, False), Recipe(TEXT_P, 6, 3e-3, True)
    runs = [over_seeds(base, items, recipe, seeds, lambda prompt: base.loss(prompt, unseen)) for recipe in (ours, peft)]
    return {"bare": bare, "tuned": runs[0], "peft": runs[1], "fall": 1 - sum(runs[0]) / len(runs[0]) / bare}


def bag_of_words(training: list[Row], heldout: list[Row]) -> float:
    counter = CountVectorizer()
    seen = counter.fit_transform([row["text"] for row in training])
    classifier = LogisticRegression(max_iter=1000).fit(seen, [row["label"] for row in training])
    return float(
        classifier.score(counter.transform([row["text"] for row in heldout]), [row["label"] for row in heldout])
    )


def measure_reviews(base: Base, training: list[Row], heldout: list[Row], seeds: int) -> dict[str, object]:
    """Held-out accuracy: bare under written templates, after our recipe, after PEFT's defaults, and a bag of words."""
    items = [base.labelled(row, FORM, str(row["label"])) for row in training]
    written = {form: base.accuracy(base.nothing, heldout, form) for form in WRITTEN}
    at_median = {form: base.accuracy_at_median(base.nothing, heldout, form) for form in WRITTEN}
    print(f"reviews: {written}, calibrated {at_median}")
    ours, peft = Recipe(REVIEW_P, 10, base.rms, False), Recipe(REVIEW_P, 10, 3e-3, True)
    runs = [
        over_seeds(base, items, recipe, seeds, lambda prompt: base.accuracy(prompt, heldout, FORM))
        for recipe in (ours, peft)
    ]
    return {
        "written": written,
        "written_calibrated": at_median,
        "tuned": runs[0],
        "peft": runs[1],
        "bag_of_words": bag_of_words(training, heldout),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    base, sets = Base(arguments.base), shipped_sets(SEED)
    result = {
        "coach": measure_text(
            base, sets["coach-prompts.csv"], sets["coach-prompts-heldout.csv"], "prompt", arguments.seeds
        ),
        "quotes": measure_text(base, sets["quotes.jsonl"], sets["quotes-heldout.jsonl"], "quote", arguments.seeds),
        "reviews": measure_reviews(base, sets["reviews.csv"], sets["reviews-heldout.csv"], arguments.seeds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
