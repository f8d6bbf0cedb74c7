"""Prompts with heads from outside: uploaded, counted, served from the library; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.app_server import AppServer, app_server
from support.encoders import build_encoder
from support.job_server import wait_until
from support.tiny_bases import build_base, random_prompt

from softprompt.base import Base
from softprompt.config import PredictConfig
from softprompt.evaluation.predict import predict
from softprompt.families.task_head import task_head
from softprompt.prompt import SoftPrompt
from softprompt.server.dependencies import dependency_of
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.storage import save_prompt
from softprompt.storage.save import adapter_to_bytes
from softprompt.types import InputForm, PromptRecord

FORM = InputForm(kind="template", template="{text}", completion="{label}", task="classify", pooling="cls",
                 labels=("a", "b"), placement="after-cls")  # fmt: skip
CLOZE = InputForm(kind="template", template="{text} [MASK]", completion="{label}", task="cloze", labels=("a", "b"),
                  label_words=(("w9",), ("w8",)), placement="after-cls")  # fmt: skip


@pytest.fixture(scope="module")
def bert() -> Base:
    return build_encoder("bert")


@pytest.fixture(scope="module")
def library(bert: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    save_prompt(made(bert, FORM), folder / "kept")
    return folder


@pytest.fixture(scope="module")
def server(bert: Base, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(bert, tmp_path_factory.mktemp("state"), library=str(library)) as found:
        yield found


def made(base: Base, form: InputForm, seed: int = 0) -> SoftPrompt:
    head = task_head(base, form)
    record = PromptRecord(form=form, base_fingerprint=base.fingerprint, base_name=base.name)
    return SoftPrompt(random_prompt(base, 3, seed), record, {} if head is None else head.start(seed))


def files_of(prompt: SoftPrompt, **form: Any) -> dict[str, bytes]:
    """Its adapter's files, with other values in the record's form."""
    files = {name: data for name, data in adapter_to_bytes(prompt).items() if name != "README.md"}
    record = json.loads(files["softprompt.json"])
    record["form"] |= form
    return {**files, "softprompt.json": json.dumps(record).encode()}


def upload(server: AppServer, name: str, files: dict[str, bytes]) -> Any:
    parts = [("files", (file, data)) for file, data in files.items()]
    return server.http.post("/v1/prompts", data={"name": name}, files=parts)


def probabilities(server: AppServer, model: str) -> list[float]:
    answer = server.post("/v1/classify", {"model": model, "input": "w7 w8"})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"][0]["probs"])


def truth(base: Base, prompt: SoftPrompt) -> Any:
    (one,) = predict(base, prompt, ["w7 w8"], PredictConfig(probabilities=True))
    return pytest.approx(list(one.probabilities.values()), abs=2e-6)


def test_an_uploaded_head_classifies_and_counts_with_its_bytes(server, bert):
    prompt = made(bert, FORM, 5)
    answer = upload(server, "mine", files_of(prompt))
    assert answer.status_code == 200, answer.text
    assert answer.json()["num_bytes"] == prompt.num_bytes > prompt.tensor.numel() * 4
    assert answer.json()["capabilities"] == ["classify"]
    assert probabilities(server, "mine") == truth(bert, prompt)
    amounts = dependency_of(server.app, PromptRegistry).amounts("")
    assert amounts.num_bytes == prompt.num_bytes
    assert server.http.patch("/v1/prompts/mine", json={"pinned": True}).json()["pinned"]
    assert upload(server, "words", files_of(made(bert, CLOZE, 6))).status_code == 200
    assert probabilities(server, "words") == truth(bert, made(bert, CLOZE, 6))


def test_the_library_serves_a_head_and_its_successor(server, bert, library):
    assert probabilities(server, "kept") == truth(bert, made(bert, FORM))
    save_prompt(made(bert, FORM, 8), library / "kept", overwrite=True)
    dependency_of(server.app, LibraryWatcher).scan()
    wait_until(lambda: probabilities(server, "kept") == truth(bert, made(bert, FORM, 8)), 10)


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ({"labels": ["a", "b", "c"]}, "for 3 labels"),
        ({"task": "tag"}, ""),
        ({"task": "embed"}, "do not belong together"),
        ({"task": "conquer"}, "task"),
        ({"placement": "behind"}, "placement is 'behind'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"template": None}, "cannot be used"),
        ({"template": "{text"}, "cannot be used"),
        ({"completion": None}, "cannot be used"),
        ({"kind": "plain", "template": None}, "cannot be used"),
        ({"labels": []}, "labels"),
        ({"has_decoder_prompt": "yes"}, ""),
    ],
)
def test_a_head_that_its_record_contradicts_is_refused(server, bert, form, word):
    answer = upload(server, "wrong", files_of(made(bert, FORM), **form))
    assert answer.status_code == 400 and word in answer.json()["error"]["message"], answer.text
    assert server.http.get("/v1/models/wrong").status_code == 404


@pytest.mark.parametrize(
    "form",
    [
        {"label_words": [["w9"]]}, {"label_words": [["w9"], ["w9"]]}, {"label_words": [["w9"], [7]]},
        {"label_words": 5}, {"template": "{text}"}, {"label_words": [["w9"], ["nobody"]]},
    ],
)  # fmt: skip
def test_label_words_that_cannot_be_told_apart_are_refused(server, bert, form):
    answer = upload(server, "wrong", files_of(made(bert, CLOZE), **form))
    assert answer.status_code == 400, answer.text


def test_a_head_of_another_base_is_refused_by_name(server, tmp_path):
    llama = build_base()
    other = made(llama, replace(FORM, placement="front", pooling="last"))
    answer = upload(server, "wrong", files_of(other))
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("invalid_adapter", "wrong_base")
