"""What the demo's figures stand beside: PEFT's defaults on the same rows and steps, written templates, a bag of words.

PEFT and scikit-learn are peers here, never part of what we do; they come with the extra `demo`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data import Rows, render_rows, task_of
from softprompt.errors import MissingDependencyError
from softprompt.prompt import SoftPrompt
from softprompt.types import Example, ExampleSet, PromptRecord

PEFT_LEARNING_RATE = 3e-3  # the notebook's; PEFT itself has none
_IGNORED = -100  # transformers' label for "no loss here"


def peft_prompt(base: Base, data: ExampleSet, config: TrainConfig) -> SoftPrompt:
    """A soft prompt trained by PEFT with its default start and transformers.Trainer with its default schedule.

    Same rows, labels, batch size, epochs and length as `config`. The base itself is not touched: PEFT gets a copy.
    Raises MissingDependencyError without peft and accelerate.
    """
    try:
        from peft import PromptTuningConfig, get_peft_model
        from transformers import PrinterCallback, Trainer
    except ImportError as error:
        raise MissingDependencyError("the demo compares with PEFT; pip install 'softprompt[demo]'") from error
    config = config.resolved(task_of(data.form))
    torch.manual_seed(config.seed)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.virtual_tokens)
    model = get_peft_model(copy.deepcopy(base.model), settings)
    with tempfile.TemporaryDirectory() as folder:
        rows = [_features(example) for example in data.examples]
        trainer = Trainer(
            model=model, args=_arguments(folder, config, base), train_dataset=rows, data_collator=_collate
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trained = model.get_prompt_embedding_to_save("default")
    return SoftPrompt(trained, PromptRecord(base_name=base.name, base_fingerprint=base.fingerprint, form=data.form))


def peft_logits(base: Base, folder: str, ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] that PEFT computes for a text under the adapter in `folder`, the virtual positions left out."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=base.device)).logits
    return logits[0, -len(ids) :]


def bag_of_words_accuracy(train: Rows, test: Rows) -> float:
    """Accuracy of logistic regression over word counts, trained on the same rows.

    Raises MissingDependencyError without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise MissingDependencyError("the demo compares with a bag of words; pip install 'softprompt[demo]'") from error
    classifier = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1_000))
    known, held_out = render_rows(train), render_rows(test)
    classifier.fit([row.prompt for row in known], [row.text for row in known])
    return float(classifier.score([row.prompt for row in held_out], [row.text for row in held_out]))


def _features(example: Example) -> dict[str, list[int]]:
    labels = [i if counted else _IGNORED for i, counted in zip(example.ids, example.target_mask, strict=True)]
    return {"input_ids": list(example.ids), "labels": labels}


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", _IGNORED), "attention_mask": mask}


def _arguments(folder: str, config: TrainConfig, base: Base) -> Any:  # Any: transformers' TrainingArguments
    from transformers import TrainingArguments

    assert config.epochs is not None, "the task's defaults are filled in"
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_rows,
        num_train_epochs=config.epochs,
        learning_rate=PEFT_LEARNING_RATE,
        seed=config.seed,
        use_cpu=base.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
