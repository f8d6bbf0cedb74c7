"""Fine-tuning jobs for heads, label words and vectors: the prompt of `softprompt train` to the bit, and served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from support.app_server import AppServer, app_server
from support.encoders import build_encoder
from support.job_server import create_job, served_prompt, trained_alone, upload, wait_for_end, wait_for_success, words
from support.seq2seq_bases import build_seq2seq

from softprompt.base import Base
from softprompt.prompt import SoftPrompt

QUICK = {"virtual_tokens": 2, "epochs": 2, "batch_rows": 8}
LABELS = ("good", "bad")


def label_rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"text": words(row, 5), "label": LABELS[row % 2]} for row in range(count)]


def tag_rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"tokens": words(row, 4).split(), "tags": ["O", LABELS[row % 2], "O", "O"]} for row in range(count)]


def embed_rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"anchor": words(row, 4), "positive": words(row + 1, 4)} for row in range(count)]


@pytest.fixture(scope="module")
def bert() -> Base:
    return build_encoder("bert", words=LABELS)


@pytest.fixture(scope="module")
def server(bert: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(bert, tmp_path_factory.mktemp("state")) as found:
        yield found


def same_prompt(left: SoftPrompt, right: SoftPrompt) -> bool:
    return (
        torch.equal(left.tensor, right.tensor)
        and left.head.keys() == right.head.keys()
        and all(torch.equal(weight, right.head[name]) for name, weight in left.head.items())
        and left.record.form == right.record.form
    )


def refusal(server: AppServer, rows: list[dict[str, Any]], settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    with pytest.raises(openai.BadRequestError) as refused:
        create_job(server.client, upload(server.client, rows), settings, **more)
    error: dict[str, Any] = refused.value.body  # type: ignore[assignment]
    return error


def test_a_classifier_is_the_prompt_and_head_of_train_to_the_bit_and_classifies(server, bert, tmp_path):
    rows = label_rows(48)
    job = wait_for_success(server.client, create_job(server.client, upload(server.client, rows), QUICK).id)
    assert job.fine_tuned_model is not None
    served = served_prompt(server.app, job.fine_tuned_model)
    assert served.record.form.task == "classify" and served.head
    assert same_prompt(served, trained_alone(bert, tmp_path, rows, QUICK))
    answer = server.post("/v1/classify", {"model": job.fine_tuned_model, "input": [rows[0]["text"]]}).json()
    assert sorted(answer["labels"]) == ["bad", "good"] and sum(answer["data"][0]["probs"]) == pytest.approx(1)
    assert answer["is_calibrated"] and answer["data"][0]["unsure"] is not None  # of 48 rows 20 were kept for validation
    (found,) = [each for each in server.client.models.list() if each.id == job.fine_tuned_model]
    assert found.capabilities == ["classify"] and found.task == "classify"
    checkpoints = server.client.fine_tuning.jobs.checkpoints.list(job.id).data
    name = checkpoints[0].fine_tuned_model_checkpoint
    assert server.post("/v1/classify", {"model": name, "input": "w7"}).status_code == 200
    settings = {"virtual_tokens": 2, "epochs": 1}  # trained further
    more = create_job(server.client, upload(server.client, rows), settings, model=job.fine_tuned_model)
    further = served_prompt(server.app, wait_for_success(server.client, more.id).fine_tuned_model)
    assert further.record.parent == served.content_hash and further.head.keys() == served.head.keys()


@pytest.mark.parametrize(
    ("rows", "settings", "task"),
    [
        (label_rows(), {**QUICK, "task": "cloze", "template": "{text} w9 [MASK]"}, "cloze"),
        (label_rows(), {**QUICK, "pooling": "mean", "placement": "front"}, "classify"),
        (tag_rows(), QUICK, "tag"),
        (embed_rows(), QUICK, "embed"),
    ],
    ids=["cloze", "mean", "tag", "embed"],
)
@pytest.mark.medium
def test_every_task_of_an_encoder_is_that_of_train(server, bert, tmp_path, rows, settings, task):
    job = wait_for_success(server.client, create_job(server.client, upload(server.client, rows), settings).id)
    served = served_prompt(server.app, job.fine_tuned_model)
    assert served.record.form.task == task
    template = settings.get("template")
    data = {} if template is None else {"template": template, "label_column": "label"}
    alone = {name: value for name, value in settings.items() if name != "template"}
    assert same_prompt(served, trained_alone(bert, tmp_path, rows, alone, **data))


@pytest.mark.medium
def test_a_job_on_an_encoder_decoder_answers_and_classifies(tmp_path):
    base = build_seq2seq("t5")
    rows = [{"text": words(row, 5), "label": f"w{10 + row % 2}"} for row in range(24)]
    with app_server(base, tmp_path / "state") as server:
        job = wait_for_success(server.client, create_job(server.client, upload(server.client, rows), QUICK).id)
        assert job.fine_tuned_model is not None
        served = served_prompt(server.app, job.fine_tuned_model)
        assert same_prompt(served, trained_alone(base, tmp_path, rows, QUICK))
        answer = server.client.completions.create(model=job.fine_tuned_model, prompt="w7 w8", max_tokens=3)
        assert answer.usage is not None and answer.usage.completion_tokens >= 1
        found = server.post("/v1/classify", {"model": job.fine_tuned_model, "input": "w7 w8"}).json()
        assert sorted(found["labels"]) == ["w10", "w11"]
        error = refusal(server, rows, {**QUICK, "task": "classify"})
        assert "is an encoder-decoder" in error["message"] and error["param"] == "hyperparameters.task"


@pytest.mark.parametrize(
    ("rows", "settings", "param", "word"),
    [
        ([{"text": "w7"}] * 9, QUICK, "hyperparameters.task", "is an encoder, which writes no text"),
        (label_rows(), {"task": "generate"}, "hyperparameters.task", "is an encoder, which writes no text"),
        (label_rows(), {"task": "tag"}, "hyperparameters.task", "not for rows of the form 'label'"),
        (label_rows(), {"task": "chat"}, "hyperparameters.task", "must be one of"),
        (label_rows(), {"task": "cloze"}, "hyperparameters.template", "needs a template with a mask"),
        (label_rows(), {"template": "no field"}, "hyperparameters.template", "the field {text}"),
        (label_rows(), {"template": "{other}"}, "hyperparameters.template", "text"),
        (tag_rows(), {"template": "{text}"}, "hyperparameters.template", "for rows with text and label"),
        (label_rows(), {"label_words": ["good=w7"]}, "hyperparameters.label_words", "are for task cloze"),
        (label_rows(), {"pooling": "max"}, "hyperparameters.pooling", "must be one of"),
        (tag_rows(), {"pooling": "mean"}, "hyperparameters.pooling", "reads its own columns"),
        (label_rows(), {"decoder_prompt": True}, "hyperparameters.decoder_prompt", "is for encoder-decoders"),
    ],
)
def test_what_the_base_or_the_rows_cannot_do_is_refused_when_the_job_is_made(server, rows, settings, param, word):
    error = refusal(server, rows, settings)
    assert error["param"] == param and word in error["message"], error


def test_files_name_the_lines_that_are_no_rows_of_their_form(server):
    for rows, word in (
        ([{"text": "w7", "label": None}], "has no label"),
        ([{"text": "w7", "label": "good"}, {"text": "w8"}], "line 2 holds text, but the rows before it text and label"),
        ([{"tokens": ["w7"], "tags": ["O", "O"]}], "1 words and column 'tags' 2 tags"),
        ([{"anchor": "w7", "label": "good"}], "holds text and label beside anchor and positive"),
    ):
        with pytest.raises(openai.BadRequestError, match=word):
            upload(server.client, rows)
    known = server.client.files.retrieve(upload(server.client, label_rows(4)))
    assert json.loads(known.to_json())["form"] == "label"


def test_a_job_whose_labels_are_one_fails_by_name(server):
    rows = [{"text": words(row), "label": "good"} for row in range(9)]
    job = wait_for_end(
        server.client, create_job(server.client, upload(server.client, rows), {**QUICK, "task": "classify"}).id
    )
    assert job.status == "failed" and job.error is not None and "needs two labels or more" in job.error.message
