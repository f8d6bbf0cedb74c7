"""Prompt tuning for sequence classification as PEFT's users do it: model, tokenizer, transformers' Trainer.

    python benchmarks/encoders_peft.py REQUEST.json

trains once, as a process of its own, for `encoders_speed.py`; `encoders.py` calls `peft_predictions`. Nothing of
softprompt is imported. N(0, 1) start, the Trainer's batches of 8, linear decay, clipping at 1 and dropout are the
defaults of the two. PEFT has no learning rate of its own: its guides for sequence classification have 1e-3 (P-tuning,
and the example notebook of prompt tuning), the Trainer has 5e-5. The rows come without `token_type_ids`, which PEFT
would prepend with floats.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEFT_RATES = (1e-3, 5e-5)
_ROWS_AT_ONCE = 32


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["folder"])
    model, tokenizer = make(request)
    seconds = fit(model, tokenizer, request, folder)
    model.save_pretrained(str(folder / "adapter"))
    (folder / "trained.json").write_text(json.dumps({"seconds": seconds}))


def peft_predictions(request: dict[str, Any], texts: Sequence[str]) -> list[int]:
    """Train by the request (see `make`, `fit`) and give the likelier label of each text."""
    import torch

    model, tokenizer = make(request)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, tokenizer, request, Path(folder))
    model.eval()
    found: list[int] = []
    with torch.no_grad():
        for first in range(0, len(texts), _ROWS_AT_ONCE):
            some = list(texts[first : first + _ROWS_AT_ONCE])
            batch = tokenizer(some, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
            found += model(**batch).logits.argmax(dim=-1).tolist()
    return found


def make(request: dict[str, Any]) -> tuple[Any, Any]:  # Any: a PeftModel and transformers' tokenizer
    """`base` is a folder, `virtual_tokens` the length, `seed` that of the start; `dtype` the file's by default."""
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(request["seed"])
    options = {"dtype": getattr(torch, request["dtype"])} if request.get("dtype") else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        request["base"], num_labels=len(set(request["labels"])), **options
    )
    settings = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=request["virtual_tokens"])
    return get_peft_model(model, settings), AutoTokenizer.from_pretrained(request["base"])


def fit(model: Any, tokenizer: Any, request: dict[str, Any], folder: Path) -> float:  # Any: as above
    """Train on `texts` and `labels` for `epochs`; the seconds of the Trainer's loop."""
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    encoded = tokenizer(list(request["texts"]), truncation=True, return_token_type_ids=False)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], request["labels"], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=request["batch_rows"],
        num_train_epochs=request["epochs"], learning_rate=request["rate"], seed=request["seed"], use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
