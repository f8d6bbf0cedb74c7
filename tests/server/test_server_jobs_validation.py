"""Fine-tuning jobs without a validation file keep rows of the training file, as `softprompt train` does."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from support.job_server import (
    SETTINGS,
    create_job,
    hold_training,
    plain_rows,
    same_bits,
    served_prompt,
    template_rows,
    trained_alone,
    upload,
    wait_for_success,
    wait_until,
)

from softprompt.base import Base
from softprompt.runs import RunFolder

FORM = {"template": "{prompt}", "completion": "{completion}"}


def messages(client: OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)]


def test_a_labelled_file_keeps_rows_as_train_does(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path
) -> None:
    client, app = server
    rows = template_rows(44)
    done = wait_for_success(client, create_job(client, upload(client, rows)).id)
    mine = served_prompt(app, str(done.fine_tuned_model))
    assert same_bits(mine, trained_alone(tiny_llama, tmp_path, rows, **FORM))
    said = "20 of 44 rows are kept for validation (labels); the hyperparameter validation 'none' trains on all"
    assert any(said in message for message in messages(client, done.id))
    assert mine.record.run["validation_losses"]


def test_a_job_ends_with_whether_its_prompt_helps(server: tuple[OpenAI, FastAPI]) -> None:
    client, app = server
    job = wait_for_success(client, create_job(client, upload(client, template_rows(44))).id)
    extra = job.model_extra or {}
    assert extra["recommendation"] in ("prompt", "bare base")
    assert extra["verdict"].startswith("On 20 validation rows the prompt is right in ")
    last, *_ = client.fine_tuning.jobs.list_events(job.id, limit=1).data
    assert last.message == extra["verdict"]
    assert (last.level == "warn") == (extra["recommendation"] == "bare base")
    run = served_prompt(app, str(job.fine_tuned_model)).record.run
    assert (run["held_out"]["text"], run["recommendation"]) == (extra["verdict"], extra["recommendation"])


def test_a_job_on_plain_text_has_no_recommendation(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    job = wait_for_success(client, create_job(client, upload(client, plain_rows(44))).id)
    assert (job.model_extra or {})["recommendation"] is None


def test_the_hyperparameter_none_trains_on_all_rows(
    server: tuple[OpenAI, FastAPI], tiny_llama: Base, tmp_path: Path
) -> None:
    client, app = server
    rows = template_rows(44)
    job = create_job(client, upload(client, rows), {**SETTINGS, "validation": "none"})
    mine = served_prompt(app, str(wait_for_success(client, job.id).fine_tuned_model))
    assert same_bits(mine, trained_alone(tiny_llama, tmp_path, rows, **FORM, kept="none"))
    assert not same_bits(mine, trained_alone(tiny_llama, tmp_path, rows, **FORM))  # the control
    assert mine.record.run["validation_losses"] == []


@pytest.mark.parametrize("is_old", [False, True], ids=["of this release", "of an earlier one"])
def test_a_paused_job_is_resumed_on_the_rows_that_it_was_begun_with(
    server: tuple[OpenAI, FastAPI], state: Path, tiny_llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    is_old: bool,
) -> None:  # fmt: skip
    """Earlier releases kept no rows of the training file, and recorded nothing of it."""
    client, app = server
    held, rows = hold_training(monkeypatch, 4), template_rows(44)
    job = create_job(client, upload(client, rows), {**SETTINGS, **({"validation": "none"} if is_old else {})})
    wait_until(lambda: 4 in held)
    client.fine_tuning.jobs.pause(job.id)
    wait_for_success(client, create_job(client, upload(client, plain_rows())).id)  # by now it has stopped
    run = RunFolder(state / "jobs" / job.id)
    plan = run.read_plan()
    assert plan["job"]["validation"] == ("none" if is_old else "20")
    if is_old:
        run.write_plan({**plan, "job": {key: value for key, value in plan["job"].items() if key != "validation"}})
    client.fine_tuning.jobs.resume(job.id)
    mine = served_prompt(app, str(wait_for_success(client, job.id).fine_tuned_model))
    kept = "none" if is_old else None
    assert same_bits(mine, trained_alone(tiny_llama, tmp_path, rows, **FORM, kept=kept))


def test_a_share_is_kept_of_plain_text_too(server: tuple[OpenAI, FastAPI]) -> None:
    client, app = server
    job = create_job(client, upload(client, plain_rows()), {**SETTINGS, "validation": 0.25})
    mine = served_prompt(app, str(wait_for_success(client, job.id).fine_tuned_model))
    assert mine.record.run["validation_losses"]


def test_a_score_may_choose_on_kept_rows(server: tuple[OpenAI, FastAPI]) -> None:
    client, app = server
    job = create_job(client, upload(client, template_rows(44)), {**SETTINGS, "best_by": "accuracy"})
    mine = served_prompt(app, str(wait_for_success(client, job.id).fine_tuned_model))
    assert mine.record.run["scores"]


@pytest.mark.parametrize("value", ["reviews.csv", "/etc/passwd", 0, 1.5, True, [1]])
def test_a_validation_that_is_no_part_of_the_file_is_refused(server: tuple[OpenAI, FastAPI], value: object) -> None:
    client, _ = server
    file = upload(client, template_rows(44))
    with pytest.raises(openai.BadRequestError) as refused:
        wait_for_success(client, create_job(client, file, {**SETTINGS, "validation": value}).id)
    assert refused.value.param == "hyperparameters.validation"


def test_a_validation_file_and_a_part_of_the_training_file_exclude_each_other(server: tuple[OpenAI, FastAPI]) -> None:
    client, _ = server
    file, other = upload(client, template_rows(44)), upload(client, template_rows(4))
    with pytest.raises(openai.BadRequestError, match="a validation_file is given, and validation too"):
        create_job(client, file, {**SETTINGS, "validation": "0.1"}, validation_file=other)
