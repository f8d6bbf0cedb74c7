"""The engine on an encoder-decoder beside transformers' own generate: t5-small's shape, seeded random weights.

    python benchmarks/seq2seq_decoding.py [--rounds 3] [--dtype float32]

Sixteen texts of 12 to 72 tokens, each behind a soft prompt of its own (P = 4), and one of them; 50 new tokens each,
greedy, no end. The two take turns in one process. transformers runs one padded batch over concatenated embeddings.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from softprompt.base import Base, freeze_base
from softprompt.config import SamplingConfig
from softprompt.engine import Engine, Finished, Request
from softprompt.families import KernelTable, forward_of, kernel_table
from softprompt.prompt import SoftPrompt

NEW, VIRTUAL = 50, 4
SAMPLING = SamplingConfig(max_new_tokens=NEW, ignore_eos=True)


def t5_small(dtype: torch.dtype) -> Base:
    """60 million parameters; a tokenizer of words, which nothing uses."""
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=32_128, d_model=512, d_kv=64, d_ff=2_048, num_layers=6, num_heads=8, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.05)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    return freeze_base(model.to(dtype), tokenizer, name="t5-small's shape")


def requests_of(base: Base, count: int) -> list[Request]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(3, base.vocab_size, (12 + 4 * number,), generator=draw)
        vectors = torch.randn(VIRTUAL, base.hidden_size, generator=draw) * base.embedding_rms
        found.append(Request(tuple(ids.tolist()), SoftPrompt(vectors), SAMPLING))
    return found


def ours(engine: Engine, requests: list[Request]) -> list[list[int]]:
    numbers = [engine.add(request) for request in requests]
    ends = {}
    while engine.has_work:
        ends.update({event.request: event for event in engine.step() if isinstance(event, Finished)})
    return [list(ends[number].answers[0].ids) for number in numbers]


@torch.inference_mode()
def theirs(base: Base, requests: list[Request]) -> list[list[int]]:
    rows = []
    for request in requests:
        assert request.prompt is not None
        text = base.embed(torch.tensor(request.ids))
        rows.append(torch.cat([request.prompt.tensor.to(base.dtype), text]))
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(embeds.shape[1]) < lengths[:, None]).long()
    found = base.model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return [row[1:].tolist() for row in found]


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def agreement(first: list[list[int]], second: list[list[int]]) -> float:
    """Share of the tokens up to the first that differs."""
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), NEW)
        for x, y in zip(first, second, strict=True)
    ]
    return sum(same) / (NEW * len(same))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    base = t5_small(getattr(torch, arguments.dtype))
    forward_of(base)
    table: KernelTable = kernel_table(base)
    engine = Engine(base)
    print(f"{base!r}; {torch.get_num_threads()} threads; kernels {table.kind}; {'; '.join(engine.notes)}")
    results = {}
    for count in (16, 1):
        requests = requests_of(base, count)
        contenders = {"ours": lambda r=requests: ours(engine, r), "transformers": lambda r=requests: theirs(base, r)}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        answers = {name: work() for name, work in contenders.items()}  # warm
        for _ in range(arguments.rounds):
            for name, work in contenders.items():
                times[name].append(timed(work)[0])
        rates = {name: NEW * count / median(own) for name, own in times.items()}
        same = agreement(answers["ours"], answers["transformers"])
        results[str(count)] = {**{name: round(rate, 1) for name, rate in rates.items()}, "agreement": round(same, 3)}
        print(
            f"{count:2} rows: ours {rates['ours']:.0f} tokens/s, transformers {rates['transformers']:.0f} "
            f"({rates['ours'] / rates['transformers']:.2f}x); {same:.1%} of the tokens up to a first difference"
        )
    print(json.dumps({"dtype": arguments.dtype, "tokens_per_s": results}))


if __name__ == "__main__":
    main()
