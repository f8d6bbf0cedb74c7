"""Fine-tuning jobs in tests: a server on a tiny base, files of every form, and the prompt that `train` makes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from softprompt.base import Base
from softprompt.config import DataConfig, TrainConfig
from softprompt.data import split_rows
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import Client
from softprompt.server.dependencies import dependency_of
from softprompt.server.jobs.run import JobRun
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.training import Event, StepDone, train
from support.app_server import app_server

ENDED = ("succeeded", "failed", "cancelled")
SETTINGS = {"virtual_tokens": 3, "epochs": 2, "batch_rows": 8}
LONG = {**SETTINGS, "epochs": 400}  # is stopped before its end

Record = dict[str, Any]


def words(row: int, count: int = 8) -> str:
    return " ".join(f"w{3 + (row * 7 + 5 * place) % 90}" for place in range(count))


def plain_rows(count: int = 24, first: int = 0) -> list[Record]:
    return [{"text": words(row)} for row in range(first, first + count)]


def template_rows(count: int = 24) -> list[Record]:
    return [{"prompt": words(row, 5), "completion": f" w{10 + row % 2}"} for row in range(count)]


def chat_rows(count: int = 24) -> list[Record]:
    return [
        {"messages": [{"role": "user", "content": words(row, 4)}, {"role": "assistant", "content": words(row + 1, 4)}]}
        for row in range(count)
    ]


@contextmanager
def job_server(base: Base, state: Path, **settings: Any) -> Iterator[tuple[OpenAI, FastAPI]]:
    """A server with its state there, and a client that does not try again."""
    with app_server(base, state, **settings) as server:
        yield server.client, server.app


def upload(client: OpenAI, rows: Sequence[Record], name: str = "rows.jsonl") -> str:
    data = "\n".join(map(json.dumps, rows)).encode()
    return client.files.create(file=(name, data), purpose="fine-tune").id


def create_job(
    client: OpenAI, file: str, settings: Record = SETTINGS, model: str = "base", **more: Any
) -> FineTuningJob:
    method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    return client.fine_tuning.jobs.create(model=model, training_file=file, method=method, **more)  # type: ignore[arg-type]


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    ends = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends, "it does not come"
        time.sleep(0.02)


def wait_for_end(client: OpenAI, job: str) -> FineTuningJob:
    """The job when it has ended."""
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job).status in ENDED)
    return client.fine_tuning.jobs.retrieve(job)


def wait_for_success(client: OpenAI, job: str) -> FineTuningJob:
    found = wait_for_end(client, job)
    assert found.status == "succeeded", found.error
    return found


def steps_done(client: OpenAI, job: str) -> int:
    """Of the latest event that tells."""
    events = client.fine_tuning.jobs.list_events(job, limit=50).data
    return max((event.data["step"] for event in events if event.type == "metrics"), default=0)  # type: ignore[index]


def hold_training(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """Training waits after each of these steps, once, until it gets a stop signal or the step leaves the list."""
    handle_event, held = JobRun.handle_event, list[int]()

    def handle_and_wait(run: JobRun, event: Event) -> None:
        handle_event(run, event)
        if isinstance(event, StepDone) and event.step in steps and event.step not in held:
            held.append(event.step)
            wait_until(lambda: run.stop_signal() is not None or event.step not in held)

    monkeypatch.setattr(JobRun, "handle_event", handle_and_wait)
    return held


def served_prompt(app: FastAPI, name: str) -> SoftPrompt:
    prompt = dependency_of(app, PromptRegistry).resolve(name, Client()).prompt
    assert prompt is not None
    return prompt


def trained_alone(
    base: Base, folder: Path, rows: Sequence[Record], settings: Record = SETTINGS, *,
    validation: Sequence[Record] | None = None, kept: str | None = None, start: SoftPrompt | None = None, **data: Any,
) -> SoftPrompt:  # fmt: skip
    """What `softprompt train` makes of a file of these rows; `kept` is the part of them that is for validation."""
    file = _written(folder / "alone.jsonl", rows)
    held_out = kept if validation is None else str(_written(folder / "alone-validation.jsonl", validation))
    config = TrainConfig(**settings)
    split = split_rows(DataConfig(data=str(file), validation=held_out, **data), seed=config.seed)
    return train(base, split.train, config, validation=split.validation, start=start).prompt


def same_bits(left: SoftPrompt, right: SoftPrompt) -> bool:
    return torch.equal(left.tensor, right.tensor)


def _written(file: Path, rows: Sequence[Record]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file
