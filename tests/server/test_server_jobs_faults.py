"""A job outlives a killed server and a full disk; one that fails says why, and the next one trains."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fastapi import FastAPI
from openai import OpenAI
from support.job_process import job_process
from support.job_server import (
    SETTINGS,
    chat_rows,
    create_job,
    hold_training,
    job_server,
    plain_rows,
    same_bits,
    served_prompt,
    trained_alone,
    upload,
    wait_for_end,
    wait_for_success,
    wait_until,
)

from softprompt.base import Base
from softprompt.data.chat_template import ChatTemplate, RenderedChat
from softprompt.data.messages import Message
from softprompt.errors import DatabaseError, MemoryLimitError, StorageError
from softprompt.runs.recorder import Recorder
from softprompt.runs.session import TrainingSession
from softprompt.server.clients.keys import Client
from softprompt.server.dependencies import dependency_of
from softprompt.server.jobs.files import Files
from softprompt.server.jobs.records import JobRecords
from softprompt.storage import load_prompt


@pytest.fixture(scope="module")
def server(tiny_llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, FastAPI]]:
    with job_server(tiny_llama, tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture(scope="module")
def file(server: tuple[OpenAI, FastAPI]) -> str:
    return upload(server[0], plain_rows())


@pytest.mark.medium
def test_a_job_of_a_killed_server_is_resumed_at_its_next_start(tiny_llama: Base, tmp_path: Path) -> None:
    state, settings = tmp_path / "state", {**SETTINGS, "epochs": 100}  # 300 steps, a checkpoint each third
    with job_process(state) as (url, process):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        job = create_job(client, upload(client, plain_rows()), settings)
        places = state / "jobs" / job.id / "checkpoints"
        wait_until(lambda: any(places.glob("step-*")))
        process.kill()
        client.close()
    saved = {int(place.name.removeprefix("step-")) for place in places.glob("step-*")}
    assert saved and max(saved) < 300
    alone = trained_alone(tiny_llama, tmp_path, plain_rows(), settings)
    with job_server(tiny_llama, state) as (client, app):
        done = wait_for_success(client, job.id)
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert any(message.startswith("training continues after step") for message in messages)
        assert same_bits(served_prompt(app, str(done.fine_tuned_model)), alone)
    assert same_bits(load_prompt(state / "jobs" / job.id, tiny_llama), alone)
    assert not same_bits(alone, trained_alone(tiny_llama, tmp_path, plain_rows(), {**settings, "epochs": 99}))


def test_a_full_disk_pauses_a_job(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, app = server

    def refuse(recorder: Recorder, event: Any) -> NoReturn:
        raise StorageError(f"no space left on the disk for {recorder.folder}: free some, or choose another disk")

    monkeypatch.setattr(Recorder, "record", refuse)
    job = create_job(client, file)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
    told = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert told.level == "error" and "has paused it" in told.message and "/" not in told.message
    monkeypatch.undo()
    client.fine_tuning.jobs.resume(job.id)
    done = wait_for_success(client, job.id)
    alone = trained_alone(tiny_llama, tmp_path, plain_rows())
    assert same_bits(served_prompt(app, str(done.fine_tuned_model)), alone)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryLimitError("one row takes 9 MiB and 1 MiB are free; use shorter rows"), "out_of_memory", "9 MiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", "fewer rows per step"),
        (ZeroDivisionError("at /home/someone/secret.py"), "server_error", "its log says why"),
    ],
    ids=["limit", "allocator", "bug"],
)
def test_a_failed_job_gives_its_reason_without_paths(
    server: tuple[OpenAI, FastAPI], file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: Exception, code: str, words: str,
) -> None:  # fmt: skip
    client, _ = server

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(TrainingSession, "train", fail)
    with caplog.at_level(logging.ERROR):
        found = wait_for_end(client, create_job(client, file).id)
    assert found.status == "failed" and found.error is not None
    assert found.error.code == code and words in found.error.message and "/" not in found.error.message
    assert ("ZeroDivisionError" in caplog.text) == (code == "server_error")
    monkeypatch.undo()
    wait_for_success(client, create_job(client, file).id)


def test_a_long_conversation_does_not_keep_a_job_from_being_cancelled(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = server
    render, rendered = ChatTemplate.render, list[int]()

    def counting(template: ChatTemplate, messages: Sequence[Message], where: str, **more: bool) -> RenderedChat:
        rendered.append(len(messages))
        return render(template, messages, where, **more)

    slow = "{% for m in messages %}{% for i in range(250) %}{% endfor %}{{ m.role }} {{ m.content }} {% endfor %}"
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", slow)
    monkeypatch.setattr(ChatTemplate, "render", counting)
    turns = [{"role": role, "content": "w5"} for _ in range(1_000) for role in ("user", "assistant")]
    job = create_job(client, upload(client, [{"messages": turns}] * 40)).id
    wait_until(lambda: bool(rendered))
    client.fine_tuning.jobs.cancel(job)
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", None)
    wait_for_success(client, create_job(client, upload(client, chat_rows())).id)
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"
    assert rendered.count(2_000) < 40


@pytest.mark.parametrize(("template", "words"), [
    ({"rag": "x", "tool_use": "y"}, "chat templates named 'rag', 'tool_use' and none named 'default'"),
    ("{{ 1/0 }}", "row 1 of .*: the tokenizer's chat template fails: ZeroDivisionError"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
])  # fmt: skip
def test_a_job_with_a_broken_chat_template_fails_with_the_reason(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, monkeypatch: pytest.MonkeyPatch, template: Any, words: str
) -> None:
    client, _ = server
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", template)
    found = wait_for_end(client, create_job(client, upload(client, chat_rows())).id)
    assert found.status == "failed" and found.error is not None
    assert found.error.code == "invalid_file" and re.search(words, found.error.message)


def test_a_job_on_a_file_changed_on_the_disk_fails_with_the_row(server: tuple[OpenAI, FastAPI]) -> None:
    client, app = server
    file = upload(client, plain_rows(), "mine.jsonl")
    place = dependency_of(app, Files).get(file, Client()).path
    lines = place.read_text().splitlines()
    lines[6] = json.dumps({"text": 7})
    place.write_text("\n".join(lines))
    found = wait_for_end(client, create_job(client, file).id)
    assert found.error is not None and found.error.code == "invalid_file"
    assert "row 7" in found.error.message and str(place.parent) not in found.error.message
    lines[4] = '{"text": '
    place.write_text("\n".join(lines))
    found = wait_for_end(client, create_job(client, file).id)
    assert found.error is not None and found.error.message.startswith(f"{file}, line 5 is not JSON")
    place.unlink()
    found = wait_for_end(client, create_job(client, file).id)
    assert found.error is not None and str(place.parent) not in found.error.message


@pytest.mark.medium
def test_the_queue_outlives_a_database_that_does_not_answer(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    client, app = server
    settings, held = {**SETTINGS, "epochs": 12}, hold_training(monkeypatch, 4)
    job = create_job(client, file, settings)
    wait_until(lambda: held == [4])

    def refuse(*_: Any) -> NoReturn:
        raise DatabaseError("the database sqlite:////home/someone/x.db cannot be used: disk I/O error")

    monkeypatch.setattr(JobRecords, "write_progress", refuse)
    monkeypatch.setattr(JobRecords, "recover", refuse)
    held.clear()
    wait_until(lambda: caplog.text.count("the queue of jobs was interrupted") >= 2)
    monkeypatch.undo()
    done = wait_for_success(client, job.id)
    alone = trained_alone(tiny_llama, tmp_path, plain_rows(), settings)
    assert same_bits(served_prompt(app, str(done.fine_tuned_model)), alone)
