"""Pretrain a tiny T5 on a CPU in a few minutes, on the embedded base's text, so that soft prompts visibly steer it.

    python tools/embedded/pretrain_t5.py --out /tmp/tiny-t5
    python tools/embedded/pretrain_t5.py --out /tmp/tiny-t5 --seconds 600

Like T5 it learns several tasks by their names, written in front of the text ("subject: ..."), and, without a name, to
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
from writer.documents import any_voice, review, say
from writer.feelings import BOTH_HANDS

BASE = Path(__file__).parents[2] / "src" / "softprompt" / "embedded" / "base"
PAD, EOS, IGNORED = 3, 2, -100
_WORDS = (5, 14)  # of a sentence, least and most
_HELD_OUT = 1_000  # the seed of sentences that are not trained on
_KINDS = {"role": "order", "quote": "saying", "story": "story", "support": "message"}
_MOODS = ("bad", "good")


class Pair(NamedTuple):
    """What the encoder reads, and what the decoder is to write."""

    text: str
    answer: str


def continued(random: Random) -> Pair:
    """The first part of a sentence, and the rest."""
    words = _sentence(random)[0].split()
    cut = random.randint(2, len(words) - 2)
    return Pair(" ".join(words[:cut]), " ".join(words[cut:]))


def subject(random: Random) -> Pair:
    text, domain, _ = _sentence(random)
    return Pair(text, domain)


def kind(random: Random) -> Pair:
    text, _, register = _sentence(random)
    return Pair(text, _KINDS[register])


def mood(random: Random) -> Pair:
    """A product review of one sentence, and what its writer feels."""
    side = random.randrange(2)
    text = _short(lambda: review(random, side, BOTH_HANDS, "pretraining", 1))
    return Pair(text, _MOODS[side])


NAMED: Mapping[str, Callable[[Random], Pair]] = {"subject": subject, "kind": kind, "mood": mood}


def _named(name: str) -> Callable[[Random], Pair]:
    def write(random: Random) -> Pair:
        pair = NAMED[name](random)
        return Pair(f"{name}: {pair.text}", pair.answer)

    return write


TASKS: Mapping[str, Callable[[Random], Pair]] = {"continue": continued, **{name: _named(name) for name in NAMED}}


def _sentence(random: Random) -> tuple[str, str, str]:
    """A sentence, its subject, and its register."""
    register = random.choice(list(_KINDS))
    while True:
        voice = any_voice(random)
        text = say(random, register, voice)
        if _WORDS[0] <= len(text.split()) <= _WORDS[1]:
            return text, voice.domain.name, register


def _short(write: Callable[[], str]) -> str:
    while True:
        text = write()
        if _WORDS[0] <= len(text.split()) <= _WORDS[1]:
            return text


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
    random, tasks = Random(seed), list(TASKS.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    began, step, loss = time.perf_counter(), 0, math.nan
    while (done := (time.perf_counter() - began) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - done))
        pairs = [random.choice(tasks)(random) for _ in range(batch_rows)]
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
    found = {}
    for name, task in TASKS.items():
        random = Random(_HELD_OUT)
        found[name] = round(float(model(**batch_of(tokenizer, [task(random) for _ in range(200)])).loss), 4)
    return found


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
