"""Rows for each task with a head or label words, and prompts for them that nobody trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data import Rows, rows_from_records, with_task
from softprompt.families.task_head import task_head
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord
from support.tiny_bases import random_ids, random_prompt

WORDS = ["bad", "good"]  # for `build_encoder(words=WORDS)`


def words(seed: int, count: int) -> list[str]:
    return [f"w{token}" for token in random_ids(count, seed)]


def records_of(task: str, count: int = 24) -> list[dict[str, Any]]:
    if task in ("classify", "cloze"):
        return [{"text": " ".join(words(i, 3 + i % 9)), "label": WORDS[i % 3 > 0]} for i in range(count)]
    if task == "tag":
        tags = ["O", "B-PER", "I-PER", "O", "B-LOC"]
        return [{"tokens": words(i, 2 + i % 4), "ner_tags": (tags[i % 5 :] + tags)[: 2 + i % 4]} for i in range(count)]
    if task == "answer":
        contexts = [words(i, 6 + i % 5) for i in range(count)]
        answers = [{"text": [" ".join(own[1:3])], "answer_start": [len(own[0]) + 1]} for own in contexts]
        return [
            {"question": f"w{50 + i}", "context": " ".join(own), "answers": answer}
            for i, (own, answer) in enumerate(zip(contexts, answers, strict=True))
        ]
    return [{"anchor": " ".join(words(i, 4)), "positive": " ".join(words(i + 500, 4))} for i in range(count)]


def rows_of(base: Base, task: str, count: int = 24, **config: Any) -> Rows:
    columns = {"template": "{text} w9 [MASK] w8", "completion": " {label}"} if task == "cloze" else {}
    settings = TrainConfig(task=task, **config)  # type: ignore[arg-type]
    return with_task(rows_from_records(records_of(task, count), task=task, **columns), base, settings)


def untrained(base: Base, form: InputForm, seed: int = 0, length: int = 3, **run: Any) -> SoftPrompt:
    """Random vectors, and a head with weights wide enough that the answers differ."""
    head = task_head(base, form)
    generator = torch.Generator().manual_seed(seed)
    weights = {} if head is None else head.start(seed)
    wide = {name: torch.randn(own.shape, generator=generator) for name, own in weights.items()}
    return SoftPrompt(random_prompt(base, length, seed).float(), PromptRecord(form=replace(form), run=run), wide)
