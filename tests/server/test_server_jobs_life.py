"""A job from its file to the prompt that is served, with the official client; the prompt is `train`'s to the bit."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from fastapi import FastAPI
from openai import OpenAI
from support.command_line import succeed
from support.gguf_files import write_gguf
from support.job_server import (
    SETTINGS,
    Record,
    chat_rows,
    create_job,
    job_server,
    plain_rows,
    same_bits,
    served_prompt,
    template_rows,
    trained_alone,
    upload,
    wait_for_end,
    wait_for_success,
    words,
)
from support.kernel_tables import own_cache, table_of, write_table
from support.slow_truth import plain_nats
from support.tiny_bases import build_base

from softprompt.base import Base, load_base
from softprompt.config import TASK_DEFAULTS
from softprompt.families.frozen_linear import FORWARD, MEASURED_ROWS, PREPACKED, can_prepack_float32
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import Client
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError
from softprompt.server.jobs.jobs import Jobs
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.storage import load_prompt


def nats(base: Base, texts: Sequence[str], prompt: SoftPrompt | None) -> float:
    """Of the texts, BOS apart, by the slow truth."""
    tensor = None if prompt is None else prompt.tensor
    rows = [base.bos_ids + base.encode(text) for text in texts]
    return sum(float(plain_nats(base, ids, [False] + [True] * (len(ids) - 1), tensor).sum()) for ids in rows)


def test_a_new_model_is_served_by_its_name(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, state: Path, tmp_path: Path
) -> None:
    client, app = server
    settings = {**SETTINGS, "epochs": 8, "virtual_tokens": 6}
    job = create_job(client, upload(client, plain_rows()), settings, suffix="reviews", metadata={"team": "a"})
    assert (job.status, job.fine_tuned_model, job.model, job.seed) == ("queued", None, tiny_llama.name, 0)
    done = wait_for_success(client, job.id)

    name = f"ft:{tiny_llama.name}:reviews:{job.id}"
    assert done.fine_tuned_model == name
    assert done.metadata == {"team": "a"}
    assert done.trained_tokens == 8 * 24 * 10  # BOS, eight words, EOS
    assert done.finished_at is not None and done.estimated_finish is None and done.error is None
    assert done.hyperparameters.n_epochs == 8 and done.hyperparameters.batch_size == 8

    mine, alone = served_prompt(app, name), trained_alone(tiny_llama, tmp_path, plain_rows(), settings)
    assert same_bits(mine, alone)
    assert not same_bits(mine, trained_alone(tiny_llama, tmp_path, plain_rows(), {**settings, "seed": 1}))
    texts = [words(row) for row in range(24)]
    assert nats(tiny_llama, texts, mine) < 0.98 * nats(tiny_llama, texts, None)
    answers = [
        client.completions.create(model=model, prompt="w3 w8", max_tokens=12, temperature=0).choices[0].text
        for model in (name, "base")
    ]
    assert answers[0] != answers[1]
    record = mine.record
    assert record.run["job"] == {
        "id": job.id, "training_file": job.training_file, "validation_file": None, "step": 24,
    }  # fmt: skip
    assert str(state) not in json.dumps(record.to_json())
    assert record.run["source"] == f"{job.training_file} (rows.jsonl)"


def test_a_job_reports_in_events_and_in_a_results_file(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    job = create_job(client, upload(client, plain_rows()))
    done = wait_for_success(client, job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # by pages
    assert len({event.id for event in events}) == len(events) > 4
    assert [event.created_at for event in events] == sorted((event.created_at for event in events), reverse=True)
    assert "served as" in events[0].message and "queued" in events[-1].message
    metrics: list[Any] = [event.data for event in events if event.type == "metrics"]
    assert (metrics[0]["step"], metrics[0]["total_steps"], metrics[-1]["step"]) == (6, 6, 1)
    assert metrics[0]["train_loss"] > 0

    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert [int(row["step"]) for row in table] == [1, 2, 3, 4, 5, 6]
    assert float(table[-1]["train_loss"]) == pytest.approx(metrics[0]["train_loss"])
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"


def test_the_last_three_checkpoints_of_a_job_are_served_as_models(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base
) -> None:
    client, app = server
    job = create_job(client, upload(client, plain_rows()), {**SETTINGS, "validate_every": 1})
    name = wait_for_success(client, job.id).fine_tuned_model
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))  # by pages
    assert [each.step_number for each in found] == [6, 5, 4]
    assert [each.fine_tuned_model_checkpoint for each in found] == [f"{name}:ckpt-step-{step}" for step in (6, 5, 4)]
    assert found[0].metrics.train_loss is not None and found[0].fine_tuning_job_id == job.id
    prompts = [served_prompt(app, each.fine_tuned_model_checkpoint) for each in found]
    assert same_bits(prompts[0], served_prompt(app, str(name)))
    assert not same_bits(prompts[0], prompts[1])
    answer = client.completions.create(model=found[1].fine_tuned_model_checkpoint, prompt="w3", max_tokens=2)
    assert answer.model == found[1].fine_tuned_model_checkpoint
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=f"{name}:ckpt-step-3", prompt="w3", max_tokens=2)


@pytest.mark.parametrize(
    ("rows", "data"),
    [(template_rows(), {"template": "{prompt}", "completion": "{completion}"}), (chat_rows(), {})],
    ids=["prompt and completion", "chat"],
)
def test_every_form_trains_as_the_command_line_does(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path, rows: list[Record], data: dict[str, str]
) -> None:
    client, app = server
    done = wait_for_success(client, create_job(client, upload(client, rows)).id)
    mine, alone = served_prompt(app, str(done.fine_tuned_model)), trained_alone(tiny_llama, tmp_path, rows, **data)
    assert same_bits(mine, alone)
    assert mine.record.form == alone.record.form


def test_a_validation_file_chooses_the_step(server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path) -> None:
    client, app = server
    rows, held_out = plain_rows(16), plain_rows(6, first=40)
    settings = {**SETTINGS, "epochs": 5, "relative_learning_rate": 2.0}
    job = create_job(client, upload(client, rows), settings, validation_file=upload(client, held_out, "held-out.jsonl"))
    done = wait_for_success(client, job.id)
    mine = served_prompt(app, str(done.fine_tuned_model))
    alone = trained_alone(tiny_llama, tmp_path, rows, settings, validation=held_out)
    assert same_bits(mine, alone)
    assert mine.record.run["kept_step"] == alone.record.run["kept_step"]
    told = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    losses = {data["step"]: data["valid_loss"] for data in told if "valid_loss" in data}  # type: ignore[index,operator]
    assert losses == dict(alone.record.run["validation_losses"])
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data[0].metrics.valid_loss == losses[10]


def test_a_job_trains_an_earlier_prompt_further(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path
) -> None:
    client, app = server
    first = str(wait_for_success(client, create_job(client, upload(client, plain_rows())).id).fine_tuned_model)
    start = served_prompt(app, first)
    file = upload(client, plain_rows(16, first=50))
    settings = {"epochs": 2}
    job = create_job(client, file, settings, model=first)
    done = wait_for_success(client, job.id)
    assert done.model == first
    mine = served_prompt(app, str(done.fine_tuned_model))
    assert mine.record.parent == start.content_hash
    assert same_bits(mine, trained_alone(tiny_llama, tmp_path, plain_rows(16, first=50), settings, start=start))
    with pytest.raises(openai.BadRequestError, match=r"virtual_tokens is 7, but .* has 3"):
        create_job(client, file, {"virtual_tokens": 7}, model=first)
    with pytest.raises(openai.BadRequestError, match="leave init and init_text out"):
        create_job(client, file, {"init": "vocab"}, model=first)


def test_a_task_score_may_choose_the_step(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    rows = template_rows()
    settings = {**SETTINGS, "best_by": "accuracy"}
    job = create_job(client, upload(client, rows[:16]), settings, validation_file=upload(client, rows[16:]))
    wait_for_success(client, job.id)
    told = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert any("score" in data for data in told)  # type: ignore[operator]


def test_openais_hyperparameters_are_translated_to_ours(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path
) -> None:
    client, app = server
    job = client.fine_tuning.jobs.create(
        model=tiny_llama.name, training_file=upload(client, plain_rows()), seed=5,
        hyperparameters={"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto", "virtual_tokens": 3}}},  # type: ignore[typeddict-unknown-key]
    )  # fmt: skip
    done = wait_for_success(client, job.id)
    asked = {"epochs": 2, "batch_rows": 6, "relative_learning_rate": 0.5 * 0.3, "virtual_tokens": 3, "seed": 5}
    found = done.hyperparameters
    assert (found.n_epochs, found.batch_size, found.learning_rate_multiplier, done.seed) == (2, 6, 0.5, 5)
    alone = trained_alone(tiny_llama, tmp_path, plain_rows(), asked)
    assert same_bits(served_prompt(app, str(done.fine_tuned_model)), alone)


def test_what_goes_by_task_is_shown_once_the_rows_are_read(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path
) -> None:
    client, app = server
    rows, few = template_rows(), {"virtual_tokens": 3, "max_steps": 2}
    job = create_job(client, upload(client, rows), few, hyperparameters={"learning_rate_multiplier": 2})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == ("auto", 2)
    done = wait_for_success(client, job.id)
    labels = TASK_DEFAULTS["labels"]
    found, settings = done.hyperparameters, done.method.supervised.hyperparameters  # type: ignore[union-attr]
    assert (found.n_epochs, found.learning_rate_multiplier) == (labels["epochs"], 2)
    assert settings.model_dump()["loss"] == labels["loss"]  # type: ignore[union-attr]
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any(message.startswith("task: labels (2 of them in") for message in said)
    asked = {**few, "relative_learning_rate": 2 * labels["relative_learning_rate"]}
    assert same_bits(served_prompt(app, str(done.fine_tuned_model)), trained_alone(tiny_llama, tmp_path, rows, asked))

    plain = wait_for_success(client, create_job(client, upload(client, plain_rows()), few).id).hyperparameters
    assert (plain.n_epochs, plain.learning_rate_multiplier) == (TASK_DEFAULTS["text"]["epochs"], 1)
    absolute = create_job(client, upload(client, plain_rows()), {**few, "learning_rate": 0.1})
    assert absolute.hyperparameters.learning_rate_multiplier is None
    wait_for_success(client, absolute.id)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"settings": {"virtual_token": 3}}, "no setting 'virtual_token' here; did you mean 'virtual_tokens'"),
    ({"settings": {"n_epoch": 3}}, "did you mean 'n_epochs'"),
    ({"settings": {"epochs": "6"}}, "epochs is '6'"),
    ({"settings": {"epochs": True}}, "epochs is True"),
    ({"settings": {"epochs": 2.5}}, "epochs is 2.5"),
    ({"settings": {"epochs": 0}}, "epochs is 0; it must be at least 1"),
    ({"settings": {"epochs": 10**9}}, "at most 1,000"),
    ({"settings": {"epochs": 10**40}}, "epochs"),
    ({"settings": {"virtual_tokens": 10**6}}, "virtual_tokens is 1,000,000; on this server it can be at most 94"),
    ({"settings": {"bottleneck": 10**9}}, "bottleneck is 1,000,000,000"),
    ({"settings": {"micro_batch_rows": 8}}, "micro_batch_rows cannot be asked for"),
    ({"settings": {"learning_rate": 1e-3, "relative_learning_rate": 0.1}}, "exclude each other"),
    ({"settings": {"learning_rate_multiplier": "fast"}}, "learning_rate_multiplier is 'fast'"),
    ({"settings": {"learning_rate_multiplier": -1}}, "learning_rate_multiplier is -1"),
    ({"settings": {"epochs": 3, "n_epochs": 4}}, "given twice"),
    ({"settings": {"learning_rate_multiplier": 2, "relative_learning_rate": 0.1}}, "exclude each other; give one"),
    ({"settings": {"init": "text"}}, "init 'text' needs init_text"),
    ({"settings": {"init_text": 3}}, "init_text is 3"),
    ({"settings": {"best_by": "accuracy"}}, "no validation rows"),
    ({"settings": {"best_by": "beauty"}}, "best_by is 'beauty'"),
    ({"seed": -1}, "seed is -1"),
    ({"suffix": "a/b"}, "suffix is 'a/b'"),
    ({"suffix": "x" * 65}, "1 to 64 letters"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations are not supported"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"extra_body": {"sufix": "a"}}, "sufix"),
    ({"extra_body": {"method": {"type": "dpo"}}}, "must be 'supervised'"),
    ({"extra_body": {"hyperparameters": 3}}, "hyperparameters"),
    ({"extra_body": {"training_file": None}}, "training_file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def file(server: tuple[OpenAI, FastAPI]) -> str:
    return upload(server[0], plain_rows())


@pytest.mark.parametrize(("asked", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_job_with_bad_settings_is_refused_at_once(
    server: tuple[OpenAI, FastAPI], file: str, asked: dict[str, Any], words: str
) -> None:
    client, _ = server
    before = client.fine_tuning.jobs.list(limit=1).data
    with pytest.raises(openai.BadRequestError) as refused:
        create_job(client, file, **asked)
    assert words in refused.value.message
    assert client.fine_tuning.jobs.list(limit=1).data == before


@pytest.mark.parametrize(
    "changes",
    [{"metadata": {"k": "\ud800"}}, {"metadata": {"\ud800": "v"}}, {"suffix": "\ud800"}, {"model": "\ud800"},
     {"hyperparameters": {"\ud800": 3}}, {"hyperparameters": {"init": "text", "init_text": "\ud800"}}, {"\ud800": 1},
     {"hyperparameters": {"learning_rate": math.nan}}, {"hyperparameters": {"learning_rate_multiplier": math.inf}},
     {"training_file": "\x00"}, {"model": "\x00"}, {"method": {"type": "\ud800"}}],
)  # fmt: skip
def test_a_job_request_of_hostile_json_is_refused(
    server: tuple[OpenAI, FastAPI], file: str, changes: dict[str, Any]
) -> None:
    client, _ = server
    body = json.dumps({"model": "base", "training_file": file, **changes})
    answer = httpx2.post(f"{client.base_url}fine_tuning/jobs", content=body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]


def test_unknown_files_models_and_jobs_are_not_found(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, _ = server
    with pytest.raises(openai.NotFoundError, match="there is no file 'file-none'"):
        create_job(client, "file-none")
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        create_job(client, file, validation_file="../../etc/passwd")
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        create_job(client, file, model="nobody")
    for call in (
        client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause,
        client.fine_tuning.jobs.resume, client.fine_tuning.jobs.list_events, client.fine_tuning.jobs.checkpoints.list,
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="there is no fine-tuning job 'ftjob-none'"):
            call("ftjob-none")
    for after in ("ftjob-none", "'; drop table jobs; --"):
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.list(after=after)


def test_training_and_validation_files_of_two_forms_are_refused(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, _ = server
    with pytest.raises(openai.BadRequestError, match="give both in one form"):
        create_job(client, file, validation_file=upload(client, chat_rows()))
    done = wait_for_success(client, create_job(client, file).id)
    with pytest.raises(openai.BadRequestError, match="fine-tune-results"):
        create_job(client, done.result_files[0])


def test_a_job_that_diverges_fails_and_the_next_one_trains(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, _ = server
    job = create_job(client, file, {**SETTINGS, "learning_rate": 1e29})
    failed = wait_for_end(client, job.id)
    assert failed.status == "failed" and failed.error is not None
    assert failed.error.code == "training_diverged" and "lower the learning rate" in failed.error.message
    assert failed.fine_tuned_model is None
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert events[0].level == "error" and events[0].message == failed.error.message
    wait_for_success(client, create_job(client, file).id)


def test_a_job_is_visible_to_its_owner_only(server: tuple[OpenAI, FastAPI], file: str) -> None:
    client, app = server
    done = wait_for_success(client, create_job(client, file).id)
    jobs, other = dependency_of(app, Jobs), Client(id="other", is_admin=False)
    with pytest.raises(ApiError) as refused:
        jobs.get(done.id, other)
    with pytest.raises(ApiError) as unknown:
        jobs.get("ftjob-" + "0" * 24, other)
    assert refused.value.message.replace(done.id, "") == unknown.value.message.replace("ftjob-" + "0" * 24, "")
    assert jobs.page(other, None, 10, None) == ([], False)
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(ApiError, match="there is no fine-tuning job"):
            change(done.id, other)
    for name in (str(done.fine_tuned_model), f"{done.fine_tuned_model}:ckpt-step-6"):
        with pytest.raises(ApiError, match="there is no model"):
            dependency_of(app, PromptRegistry).resolve(name, other)


def test_a_suffix_with_spaces_is_written_with_hyphens(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    job = wait_for_success(
        client, create_job(client, upload(client, plain_rows()), {"epochs": 1}, suffix="my first  prompt").id
    )
    assert job.fine_tuned_model == f"ft:tiny-llama:my-first-prompt:{job.id}"
    assert job.user_provided_suffix == "my first  prompt"  # type: ignore[attr-defined]  # not in the client's types
    assert client.completions.create(model=job.fine_tuned_model, prompt="w3", max_tokens=2).usage


def test_the_checkpoints_of_a_deleted_model_go_with_it(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    file = upload(client, plain_rows())
    gone, stays = (wait_for_success(client, create_job(client, file, {"epochs": 2}).id) for _ in range(2))
    assert gone.fine_tuned_model and stays.fine_tuned_model
    (last, _), kept = (client.fine_tuning.jobs.checkpoints.list(job.id).data for job in (gone, stays))
    client.put("/aliases/pointer", body={"model": last.fine_tuned_model_checkpoint}, cast_to=object)
    with pytest.raises(openai.ConflictError, match=r"the alias 'pointer' points to .*ckpt-step"):
        client.models.delete(gone.fine_tuned_model)
    client.delete("/aliases/pointer", cast_to=object)
    client.models.delete(gone.fine_tuned_model)
    left = {model.id for model in client.models.list()}
    assert not any(name.startswith(gone.fine_tuned_model) for name in left)
    assert {each.fine_tuned_model_checkpoint for each in kept} < left
    assert client.fine_tuning.jobs.checkpoints.list(gone.id).data == []
    client.models.delete(kept[0].fine_tuned_model_checkpoint)  # a single one too
    assert client.fine_tuning.jobs.checkpoints.list(stays.id).data == kept[1:]


def test_a_job_that_fails_on_its_validation_file_names_it(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    training, validation = (upload(client, plain_rows()) for _ in range(2))  # no row that is not trained on
    job = wait_for_end(client, create_job(client, training, {"epochs": 1}, validation_file=validation).id)
    assert job.status == "failed" and job.error
    assert (job.error.param, job.error.code) == ("validation_file", "invalid_file") and validation in job.error.message


def test_a_job_on_a_gguf_file_equals_the_command_on_it(tmp_path: Path) -> None:
    file, rows = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in plain_rows()))
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ("train", "--base", file, "--data", rows, "--text-column", "text", "--dtype", "float32", *flags)
    with job_server(load_base(str(file), dtype="float32"), tmp_path / "state") as (client, app):
        done = wait_for_success(client, create_job(client, upload(client, plain_rows())).id)
        mine = served_prompt(app, str(done.fine_tuned_model))
    succeed(*command, "--out", tmp_path / "prompt")
    assert same_bits(mine, load_prompt(tmp_path / "prompt"))
    assert mine.record.base_fingerprint == load_prompt(tmp_path / "prompt").record.base_fingerprint
    succeed(*command, "--out", tmp_path / "other", "--seed", 1)
    assert not same_bits(mine, load_prompt(tmp_path / "other"))  # the control


@pytest.mark.skipif(not can_prepack_float32(torch.zeros(2, 2)), reason="here torch has no second way with other bits")
def test_a_job_equals_a_training_under_measured_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the server's own answers use prepacked weights, which a training by itself does not have."""

    def base() -> Base:
        return build_base("llama", hidden_size=64, intermediate_size=1_024)

    cache = own_cache(monkeypatch, tmp_path / "cache")
    table = table_of(base(), "onednn")
    copies = {name.replace(FORWARD, PREPACKED): dict.fromkeys(MEASURED_ROWS, "prepacked") for name in table.choices}
    write_table(cache, replace(table, choices={**table.choices, **copies}))
    with job_server(base(), tmp_path / "state") as (client, app):
        done = wait_for_success(client, create_job(client, upload(client, plain_rows())).id)
        mine = served_prompt(app, str(done.fine_tuned_model))
    assert same_bits(mine, trained_alone(base(), tmp_path, plain_rows()))
    write_table(cache, table_of(base(), "linear"))
    assert not same_bits(mine, trained_alone(base(), tmp_path, plain_rows()))  # the control
