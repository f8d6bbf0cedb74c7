"""Pretrain a tiny T5 on a CPU in a few minutes, on the embedded base's text, so that soft prompts visibly steer it.

    python tools/embedded/pretrain_t5.py --out /tmp/tiny-t5
    python tools/embedded/pretrain_t5.py --out /tmp/tiny-t5 --seconds 600

Like T5 it learns several tasks by their names, written in front of the text ("last word: ..."), and, without a name, to
go on: from the first part of a sentence to the rest. A soft prompt takes the place of such a name. The tokenizer is the
embedded base's, with a space before a text and EOS behind it, as T5's. The last line printed is JSON: parameters,
steps, time, and the nats per token on sentences that were not trained on, by task.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from writer.corpus import shard

BASE = Path(__file__).parents[2] / "src" / "softprompt" / "embedded" / "base"
PAD, EOS, IGNORED = 3, 2, -100
_WORDS = (5, 12)  # of a sentence, least and most
_HELD_OUT = 99  # the shard that is not trained on


class Pair(NamedTuple):
    """What the encoder reads, and what the decoder is to write."""

    text: str
    answer: str


def _split(words: Sequence[str], random: Random) -> Pair:
    cut = random.randint(2, len(words) - 2)
    return Pair(" ".join(words[:cut]), " ".join(words[cut:]))


def _named(name: str, answer: Callable[[Sequence[str]], str]) -> Callable[[Sequence[str], Random], Pair]:
    return lambda words, random: Pair(f"{name}: {' '.join(words)}", answer(words))


ANSWERS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "first word": lambda words: words[0],
    "last word": lambda words: words[-1].strip(".,;:?!"),
    "second word": lambda words: words[1],
}
TASKS = {"continue": _split, **{name: _named(name, answer) for name, answer in ANSWERS.items()}}


def sentences(number: int) -> list[list[str]]:
    """Sentences of one shard of the writer's text, as words."""
    lines = [line for document in shard(number) for line in document.split("\n")]
    parts = [part.split() for line in lines for part in line.replace("? ", "?|").replace(". ", ".|").split("|")]
    return [words for words in parts if _WORDS[0] <= len(words) <= _WORDS[1]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded base's tokens, around a text as T5 has them."""
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def build_model(vocabulary: int, width: int, layers: int) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=width, d_kv=32, d_ff=3 * width, num_layers=layers, num_heads=width // 32,
            dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        )
    )  # fmt: skip


def batch_of(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    read = [torch.tensor(ids) for ids in tokenizer([pair.text for pair in pairs])["input_ids"]]
    written = [torch.tensor(ids) for ids in tokenizer(text_target=[pair.answer for pair in pairs])["input_ids"]]
    return {
        "input_ids": pad_sequence(read, batch_first=True, padding_value=PAD),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in read], batch_first=True),
        "labels": pad_sequence(written, batch_first=True, padding_value=IGNORED),
    }


def pretrain(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seconds: float, batch_rows: int, seed: int
) -> tuple[int, float]:
    """Train for that long; the number of steps, and the last loss. The rate falls with the time that is left."""
    random, known = Random(seed), [words for number in range(12) for words in sentences(number)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    began, step, loss = time.perf_counter(), 0, math.nan
    while (done := (time.perf_counter() - began) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - done))
        pairs = [random.choice(list(TASKS.values()))(random.choice(known), random) for _ in range(batch_rows)]
        found = model(**batch_of(tokenizer, pairs)).loss
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, loss = step + 1, float(found.detach())
        if step % 100 == 0:
            print(f"step {step}: {loss:.3f} nats, {time.perf_counter() - began:.0f} s", flush=True)
    return step, loss


@torch.no_grad()
def held_out(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Nats per token of each task on sentences that were not trained on."""
    random, known = Random(0), sentences(_HELD_OUT)[:200]
    return {
        name: round(float(model(**batch_of(tokenizer, [task(words, random) for words in known])).loss), 4)
        for name, task in TASKS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of the base to write")
    parser.add_argument("--seconds", type=float, default=300.0, help="time to train")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3, help="of the encoder, and of the decoder")
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), asked.width, asked.layers)
    steps, loss = pretrain(model, tokenizer, asked.seconds, asked.batch_rows, asked.seed)
    model.eval().save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    figures = {
        "parameters": model.num_parameters(), "steps": steps, "seconds": asked.seconds, "loss": round(loss, 4),
        "held_out": held_out(model, tokenizer),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
