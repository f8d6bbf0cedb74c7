"""The notebook "Prompt Tuning With PEFT", step by step, on the true model and its two Hub data sets.

Needs the Hub (bigscience/bloomz-560m is 1.1 GB). Never run against the real Hub so far; `--base` and `--prompts` /
`--quotes` take local files instead, which is how it is tested.

    python examples/notebook.py
    python examples/notebook.py --preset notebook      # the notebook's exact settings
"""

from __future__ import annotations

import argparse
from pathlib import Path

from softprompt import (
    DataConfig,
    SamplingConfig,
    TrainConfig,
    compare,
    load_base,
    load_prompt,
    read_rows,
    save_prompt,
    train,
)
from softprompt.base.load import describe, trainable_line
from softprompt.config import PRESETS

INPUTS = ["I want you to act as a motivational coach. ", "There are two nice things that should matter to you:"]


def main() -> None:
    flags = parse()
    settings = {"virtual_tokens": 4, "epochs": 6, "batch_rows": 8, **PRESETS.get(flags.preset, {})}
    dtype = settings.pop("dtype", "auto")
    config = TrainConfig(**settings)

    base = load_base(flags.base, dtype=dtype)
    print(describe(base))
    print(trainable_line(base, config.virtual_tokens))

    before = compare(base, {}, INPUTS, sampling=SamplingConfig(max_new_tokens=50, repetition_penalty=1.5))
    for item in before.answered:
        print(f"before: {item.input}{item.answers[None]}")

    sets = {
        "prompts": DataConfig(data=flags.prompts, text_column="prompt", rows=50),
        "quotes": DataConfig(data=flags.quotes, text_column="quote", rows=25),
    }
    for name, data in sets.items():
        result = train(base, read_rows(data), config)
        print(f"{name}: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} nats per target")
        save_prompt(result.prompt, flags.out / name, overwrite=True)

    loaded = {name: load_prompt(flags.out / name, base) for name in sets}  # both on the one base
    after = compare(base, loaded, INPUTS, sampling=SamplingConfig(max_new_tokens=100, repetition_penalty=1.5))
    for item in after.answered:
        for name in sets:
            print(f"{name}: {item.input}{item.answers[name]}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="bigscience/bloomz-560m")
    parser.add_argument("--prompts", default="fka/awesome-chatgpt-prompts")
    parser.add_argument("--quotes", default="Abirate/english_quotes")
    parser.add_argument("--preset", choices=list(PRESETS))
    parser.add_argument("--out", type=Path, default=Path("notebook-out"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
