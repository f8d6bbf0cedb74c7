"""The cases of real_base.py and the children that train in them: softprompt's `train` and PEFT under the Trainer.

A random shape has no tokenizer worth the name: its rows are ids, see training_cases.py. SmolLM2's rows are texts, which
both sides tokenise inside the clock, as their users would.
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generation_cases import Workload
from training_cases import BATCH_ROWS, GROUPS, Request, make_example_set, make_rows, make_start

STREAMS = (1, 4, 16, 32)
TEXT_TOKENS, NEW_TOKENS = 12, 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """Rows to train on. `target` is of SmolLM2 on two AVX2 cores: times PEFT's speed, at least."""

    name: str
    virtual_tokens: int
    epochs: int
    rows: str  # roles or quotes
    target: float
    is_process: bool = False  # the time is the whole process's, from exec to exit


TRAIN_CASES = (
    TrainCase(name="train-p4", virtual_tokens=4, epochs=1, rows="roles", target=1.5),
    TrainCase(name="train-p100", virtual_tokens=100, epochs=1, rows="roles", target=3.2),
    TrainCase(name="quotes", virtual_tokens=4, epochs=6, rows="quotes", target=1.6, is_process=True),
)
DECODE_TARGETS = {1: 1.3, 4: 2.0, 16: 1.6, 32: 1.6}  # times generate, of SmolLM2 on two AVX2 cores
INT8_TARGETS = {"generate": 3.0, "llama.cpp Q8_0": 0.6}
CASES = (*(case.name for case in TRAIN_CASES), "decode", "int8")
NUM_ROWS = {"roles": 50, "quotes": 25}


def read_texts(rows: str, data: Path | None) -> list[str]:
    """The first 50 role prompts, or 25 quotes: of the folder with real sets, or the package's own."""
    from softprompt import embedded

    own = Path(embedded.__file__).parent / "data"
    if rows == "roles":
        file = own / "coach-prompts.csv" if data is None else data / "awesome-chatgpt-prompts" / "prompts.csv"
        with file.open(newline="") as lines:
            texts = [row["prompt"] for row in csv.DictReader(lines)]
    else:
        file = own / "quotes.jsonl" if data is None else data / "english-quotes" / "quotes.jsonl"
        texts = [json.loads(line)["quote"] for line in file.read_text().splitlines()]
    return texts[: NUM_ROWS[rows]]


def decode_workload(streams: int) -> Workload:
    """As many requests as streams, each behind a soft prompt of its own, all there at once."""
    return Workload(
        name=f"{streams} stream{'s' * (streams > 1)}", num_requests=streams, max_rows=streams, text_tokens=TEXT_TOKENS,
        new_tokens=(NEW_TOKENS, NEW_TOKENS),
    )  # fmt: skip


def train_ours(request: Request) -> Request:
    """Child: one call of `train`, with the notebook's settings; its time includes what it sets up."""
    from softprompt import SoftPrompt, TrainConfig, load_base, rows_from_texts, save_prompt, train
    from softprompt.config import NOTEBOOK_PRESET
    from softprompt.training import StepDone

    began = time.perf_counter()
    base = load_base(request["model"], dtype="float32", device="cpu")
    loaded = time.perf_counter() - began
    asked = {name: request[name] for name in ("virtual_tokens", "epochs")}
    config = TrainConfig(**{**NOTEBOOK_PRESET, **asked})
    steps: list[StepDone] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        texts = request["texts"]
        data = make_example_set(_ids(request, base.vocab_size)) if texts is None else rows_from_texts(texts)
        start = SoftPrompt(make_start(request["virtual_tokens"], base.hidden_size))
        result = train(base, data, config, start=start, sink=lambda event: _keep(event, steps))
        seconds = time.perf_counter() - began
        save_prompt(result.prompt, folder)
    return {
        "seconds": seconds,
        "load_seconds": loaded,
        "setup_seconds": seconds - sum(step.seconds for step in steps),
        "num_tokens": sum(step.num_targets for step in steps),
        "losses": [step.loss for step in steps],
    }


def _keep(event: Any, steps: list[Any]) -> None:  # Any: softprompt's events, which the peer's process does not import
    if type(event).__name__ == "StepDone":
        steps.append(event)


def _ids(request: Request, vocab: int) -> list[tuple[int, ...]]:
    """Rows of a random shape."""
    return make_rows(GROUPS["p4"], vocab)[: request["num_rows"]]


def train_peft(request: Request) -> Request:
    """Child: PEFT's prompt tuning under transformers.Trainer, as the notebook "Prompt Tuning With PEFT" calls them."""
    from generation_peers import load
    from peft import PromptTuningConfig, get_peft_model
    from transformers import DataCollatorForLanguageModeling, PrinterCallback, Trainer

    model, loaded = load(request["model"], torch.float32)
    tokenizer = load_tokenizer(request["model"])
    tokenizer.padding_side = "right"  # behind left padding PEFT's first text token would follow a pad
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        texts, vocab = request["texts"], model.config.vocab_size
        found = _ids(request, vocab) if texts is None else tokenizer(texts)["input_ids"]
        rows = [{"input_ids": list(ids)} for ids in found]
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=request["virtual_tokens"])
        tuned = get_peft_model(model, settings)
        if not request["is_process"]:  # there each side has the notebook's random start
            _start_alike(tuned.prompt_encoder["default"].embedding.weight)
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model=tuned, args=_arguments(folder, request), train_dataset=rows, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = time.perf_counter() - began
        tuned.save_pretrained(folder)
    num_tokens = request["epochs"] * sum(len(row["input_ids"]) for row in rows)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {"seconds": seconds, "load_seconds": loaded, "setup_seconds": 0.0}
    return {**figures, "num_tokens": num_tokens, "losses": logged}


def _start_alike(weight_PH: torch.Tensor) -> None:
    """Ours and the peer begin a case at the same prompt."""
    with torch.no_grad():
        weight_PH.copy_(make_start(*weight_PH.shape))


def _arguments(folder: str, request: Request) -> Any:  # Any: TrainingArguments
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH_ROWS, num_train_epochs=request["epochs"],
        learning_rate=LEARNING_RATE, use_cpu=True, save_strategy="no",
        logging_steps=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def load_tokenizer(model: str) -> Any:  # Any: transformers' tokenizer
    """Of a folder, or of a GGUF file."""
    from transformers import AutoTokenizer

    file = Path(model)
    if file.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return AutoTokenizer.from_pretrained(model)
