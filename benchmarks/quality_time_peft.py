"""The process of quality_time.py that trains with PEFT, as its users do: model, tokenizer, transformers' Trainer.

    python benchmarks/quality_time_peft.py REQUEST.json

It imports nothing of softprompt. After each epoch it writes the prompt's vectors into the request's folder; the times
of these files are the curve.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

BATCH_ROWS = 8

IGNORED = -100  # transformers' label for "no loss here"


def main() -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainerCallback,
    )

    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["folder"])
    base = request["base"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, request["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "right"  # behind left padding PEFT's first text token would follow a pad
    torch.manual_seed(request["seed"])
    settings = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=request["virtual_tokens"], **start_of(request["start"], base)
    )
    tuned = get_peft_model(model, settings)
    rows = [encoded(tokenizer, *pair) for pair in request["rows"]]

    class Keep(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            keep(tuned, folder, round(state.epoch))

    trainer = Trainer(
        model=tuned, args=arguments(folder, request), train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), callbacks=[Keep()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tuned.save_pretrained(str(folder / "adapter"))


def start_of(start: str | dict[str, str], base: str) -> dict[str, Any]:
    """PEFT's own settings of a start: N(0, 1), vectors of drawn tokens, or those of a text."""
    if isinstance(start, str):
        return {"prompt_tuning_init": {"N(0,1)": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}[start]}
    return {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": start["text"], "tokenizer_name_or_path": base,
    }  # fmt: skip


def encoded(tokenizer: Any, prompt: str, text: str) -> dict[str, list[int]]:  # Any: transformers' tokenizer
    """Ids and labels; a prompt in front of the text is no target."""
    before = tokenizer(prompt)["input_ids"] if prompt else []
    own = tokenizer(text)["input_ids"]
    ids = [*before, *own]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(before) + own}


def keep(tuned: Any, folder: Path, epoch: int) -> None:  # Any: a PeftModel
    """Whole or not at all; a few milliseconds."""
    new = folder / f"epoch-{epoch}.new"
    torch.save(tuned.prompt_encoder["default"].embedding.weight.detach().float().clone(), new)
    new.replace(folder / f"epoch-{epoch}.pt")


def arguments(folder: Path, request: dict[str, Any]) -> Any:  # Any: TrainingArguments
    """The Trainer's linear decay and clipping at 1 are its defaults."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH_ROWS, num_train_epochs=request["epochs"],
        learning_rate=request["learning_rate"], seed=request["seed"], use_cpu=True, save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
