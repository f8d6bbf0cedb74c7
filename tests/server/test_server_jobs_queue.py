"""Cancel, pause and resume; whose turn it is; how many jobs a client may have; and a server that stops in mid-job."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from support.job_server import (
    LONG,
    SETTINGS,
    Record,
    create_job,
    hold_training,
    job_server,
    plain_rows,
    same_bits,
    served_prompt,
    steps_done,
    trained_alone,
    upload,
    wait_for_success,
    wait_until,
)

from softprompt.base import Base
from softprompt.config import ServerConfig
from softprompt.runs import RunFolder
from softprompt.runs.session import TrainingSession
from softprompt.server.clients.keys import Client, Limits
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError
from softprompt.server.jobs.jobs import Jobs
from softprompt.server.jobs.records import JobRecords, NewEvent
from softprompt.server.jobs.run import JobRun
from softprompt.server.jobs.schemas import CreateJob
from softprompt.server.state.database import Database
from softprompt.server.state.schema import JobRow
from softprompt.training import Event, SliceDone, StepDone, Trial

MIDDLE = {**SETTINGS, "epochs": 12}  # 36 steps, stopped on the way and let end


@pytest.fixture(scope="module")
def server(tiny_llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, FastAPI]]:
    with job_server(tiny_llama, tmp_path_factory.mktemp("state"), max_jobs=4) as found:
        yield found


@pytest.fixture(scope="module")
def file(server: tuple[OpenAI, FastAPI]) -> str:
    return upload(server[0], plain_rows())


def test_a_running_job_is_cancelled_and_the_next_one_runs(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, _ = server
    long, short = create_job(client, file, LONG), create_job(client, file)
    wait_until(lambda: steps_done(client, long.id) > 2)
    running = client.fine_tuning.jobs.retrieve(long.id)
    assert running.status == "running" and running.trained_tokens is None
    assert running.estimated_finish is not None and running.estimated_finish >= int(time.time())
    assert client.fine_tuning.jobs.retrieve(short.id).status == "queued"

    cancelled = client.fine_tuning.jobs.cancel(long.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    wait_for_success(client, short.id)
    assert client.fine_tuning.jobs.retrieve(long.id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(long.id).fine_tuned_model is None
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            call(long.id)
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="is succeeded"):
            call(short.id)


@pytest.mark.parametrize(
    "more",
    [{}, pytest.param({"validate_every": 5, "save_every": 2}, marks=pytest.mark.medium)],
    ids=["epochs", "often"],
)
def test_a_paused_job_lets_others_run_and_becomes_the_same_prompt(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, file: str, tmp_path: Path, more: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    client, app = server
    held = hold_training(monkeypatch, 4, 9)
    held_out = upload(client, plain_rows(4, first=60)) if more else None
    job = create_job(client, file, {**MIDDLE, **more}, validation_file=held_out)
    for step in (4, 9):
        wait_until(lambda step=step: step in held)  # type: ignore[misc]
        assert client.fine_tuning.jobs.pause(job.id).status == "paused"
        wait_for_success(client, create_job(client, file).id)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
        assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "validating_files")
    done = wait_for_success(client, job.id)
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert sum(message.startswith("training continues after step") for message in messages) == 2
    assert done.trained_tokens == 12 * 24 * 10
    alone = trained_alone(
        tiny_llama, tmp_path, plain_rows(), {**MIDDLE, **more}, validation=plain_rows(4, first=60) if more else None
    )
    mine = served_prompt(app, str(done.fine_tuned_model))
    assert same_bits(mine, alone)
    assert mine.record.run["losses"] == alone.record.run["losses"]
    assert mine.record.run["validation_losses"] == alone.record.run["validation_losses"]


def test_a_job_paused_within_a_validation_finishes_it_first(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a step and its validation there is no state to go on from: the validation would be left out."""
    client, app = server
    handle_event, seen, running = JobRun.handle_event, list[Event](), list[str]()

    def pause_in_validation(run: JobRun, event: Event) -> None:
        handle_event(run, event)
        if seen and isinstance(event, SliceDone) and isinstance(seen[-1], StepDone) and event.step == 3:
            wait_until(lambda: bool(running))
            client.fine_tuning.jobs.pause(running[0])
        seen.append(event)

    monkeypatch.setattr(JobRun, "handle_event", pause_in_validation)
    held_out, settings = plain_rows(4, first=60), {**SETTINGS, "validate_every": 3, "relative_learning_rate": 3.0}
    job = create_job(client, file, settings, validation_file=upload(client, held_out))
    running.append(job.id)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
    client.fine_tuning.jobs.resume(job.id)
    mine = served_prompt(app, str(wait_for_success(client, job.id).fine_tuned_model))
    alone = trained_alone(tiny_llama, tmp_path, plain_rows(), settings, validation=held_out)
    assert mine.record.run["validation_losses"] == alone.record.run["validation_losses"]
    assert same_bits(mine, alone)


def test_a_queued_job_can_be_paused_and_cancelled(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, _ = server
    long, first, second = create_job(client, file, LONG), create_job(client, file), create_job(client, file)
    assert client.fine_tuning.jobs.pause(first.id).status == "paused"
    assert client.fine_tuning.jobs.cancel(first.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    client.fine_tuning.jobs.cancel(long.id)


def test_a_client_with_too_many_jobs_is_refused(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, app = server
    jobs = [create_job(client, file, LONG) for _ in range(4)]
    with pytest.raises(openai.RateLimitError, match="4 of your fine-tuning jobs") as refused:
        create_job(client, file)
    assert int(refused.value.response.headers["retry-after"]) > 0
    client.fine_tuning.jobs.pause(jobs[3].id)
    jobs.append(create_job(client, file, LONG))
    with pytest.raises(openai.RateLimitError):
        client.fine_tuning.jobs.resume(jobs[3].id)
    assert client.fine_tuning.jobs.retrieve(jobs[3].id).status == "paused"
    for job in jobs:
        client.fine_tuning.jobs.cancel(job.id)
    asked = CreateJob(model="base", training_file=file)
    with pytest.raises(ApiError, match="0 of your fine-tuning jobs wait or run, and 0 may"):
        dependency_of(app, Jobs).create(asked, Client(limits=Limits(max_jobs=0)))


def test_jobs_are_listed_by_pages_and_by_metadata(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, _ = server
    marked = [create_job(client, file, metadata={"run": str(index % 2), "set": "listed"}) for index in range(3)]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"set": "listed"})]
    assert listed == [job.id for job in reversed(marked)]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"set": "listed", "run": "1"})] == [marked[1].id]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=3)][:3] == listed
    everything = list(client.fine_tuning.jobs.list(limit=100))
    assert len({job.id for job in client.fine_tuning.jobs.list(limit=2)}) == len(everything)
    without = client.fine_tuning.jobs.list(extra_query={"metadata": "null"}, limit=100).data
    assert {job.id for job in everything} - {job.id for job in without} == {job.id for job in marked}
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.fine_tuning.jobs.list(limit=0)
    for job in marked:
        wait_for_success(client, job.id)


def test_clients_take_turns_and_an_interrupted_job_goes_first(tmp_path: Path) -> None:
    database = Database.in_folder(tmp_path)
    records = JobRecords(database)
    for number, owner in enumerate("aaabbc"):
        row = JobRow(id=f"{owner}{number}", owner=owner, status="queued", model="base", training_file="f",
                     settings={}, outcome={}, created=float(number))  # fmt: skip
        records.add(row, NewEvent("queued"))

    def turn() -> str:
        row = records.next()
        assert row is not None
        records.move(row.id, ("queued",), "running", started=time.time())
        return row.id

    assert [turn(), turn(), turn()] == ["a0", "b3", "c5"]
    records.recover()  # all three were running when the server ended
    assert {turn(), turn(), turn()} == {"a0", "b3", "c5"}
    assert not records.move("a0", ("queued",), "cancelled")
    for job in ("a0", "b3", "c5"):
        assert records.move(job, ("running",), "succeeded")
    assert [turn(), turn(), turn()] == ["a1", "b4", "a2"]
    assert records.next() is None
    database.close()


def test_a_job_that_crashes_the_server_ten_times_is_paused(tmp_path: Path) -> None:
    database = Database.in_folder(tmp_path)
    records = JobRecords(database)
    row = JobRow(id="a", owner="", status="queued", model="base", training_file="f", settings={}, outcome={}, created=0)
    records.add(row, NewEvent("queued"))
    for _ in range(10):
        assert records.move("a", ("queued",), "running")
        records.recover()
    found = records.get("a")
    assert found is not None and found.status == "paused"
    assert "10 times in a row" in records.events("a", None, 1)[0][0].message
    database.close()


def test_a_job_of_a_stopped_server_is_resumed_at_its_next_start(
    tiny_llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, held = tmp_path / "state", hold_training(monkeypatch, 4)
    with job_server(tiny_llama, state) as (client, _):
        file = upload(client, plain_rows())
        job = create_job(client, file, MIDDLE)
        wait_until(lambda: held == [4])
        waiting = create_job(client, file)
    saved, problems = RunFolder(state / "jobs" / job.id).load_latest()
    assert saved is not None and not problems and saved.state["step"] == 4
    with job_server(tiny_llama, state) as (client, app):
        done = wait_for_success(client, job.id)
        assert same_bits(served_prompt(app, str(done.fine_tuned_model)),
                         trained_alone(tiny_llama, tmp_path, plain_rows(), MIDDLE))  # fmt: skip
        name = wait_for_success(client, waiting.id).fine_tuned_model
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        assert any("the server stops" in event.message for event in events)
        assert not (state / "jobs" / job.id / "checkpoints").exists()
        wait_until(lambda: gc.collect() >= 0 and not any(isinstance(each, Trial) for each in gc.get_objects()))
    with job_server(tiny_llama, state) as (client, app):  # what was trained is served again
        assert client.fine_tuning.jobs.retrieve(waiting.id).status == "succeeded"
        assert client.completions.create(model=str(name), prompt="w3", max_tokens=2).model == name


@pytest.mark.medium
def test_a_job_made_for_another_base_fails_and_names_it(tiny_llama: Base, tiny_gpt2: Base, tmp_path: Path) -> None:
    with job_server(tiny_llama, tmp_path) as (client, _):
        job = create_job(client, upload(client, plain_rows()), LONG)
        wait_until(lambda: steps_done(client, job.id) >= 1)
    with job_server(tiny_gpt2, tmp_path) as (client, _):
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "failed")
        error = client.fine_tuning.jobs.retrieve(job.id).error
        assert error is not None and "made for another base" in error.message


def test_a_stop_signal_is_obeyed_within_a_slice_where_training_yields_to_the_engine(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it read between slices only, one long slice would keep the job running until its end."""
    client, app = server
    held = hold_training(monkeypatch, 4)
    handle_event, check_stop = JobRun.handle_event, TrainingSession.check_stop
    is_between_slices = list[bool]()

    def handle(run: JobRun, event: Event) -> None:
        handle_event(run, event)
        is_between_slices.append(True)

    def check_within_slices(session: TrainingSession) -> None:
        if is_between_slices:
            is_between_slices.clear()
        else:
            check_stop(session)

    monkeypatch.setattr(JobRun, "handle_event", handle)
    monkeypatch.setattr(TrainingSession, "check_stop", check_within_slices)
    job = create_job(client, file, MIDDLE)
    wait_until(lambda: held == [4])
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    wait_for_success(client, create_job(client, file, {**SETTINGS, "max_steps": 1}).id)
    monkeypatch.undo()
    saved, _ = RunFolder(Path(dependency_of(app, ServerConfig).state) / "jobs" / job.id).load_latest()
    assert saved is not None and saved.state["step"] == 4
    client.fine_tuning.jobs.resume(job.id)
    done = wait_for_success(client, job.id)
    alone = trained_alone(tiny_llama, tmp_path, plain_rows(), MIDDLE)
    assert same_bits(served_prompt(app, str(done.fine_tuned_model)), alone)


@pytest.mark.medium
def test_a_paused_job_that_is_cancelled_leaves_no_state(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, app = server
    job = create_job(client, file, LONG)
    wait_until(lambda: steps_done(client, job.id) > 2)
    client.fine_tuning.jobs.pause(job.id)
    folder = Path(dependency_of(app, ServerConfig).state) / "jobs" / job.id / "checkpoints"
    wait_until(lambda: any(folder.glob("step-*")))
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: not folder.exists())
