"""A text that the base's tokenizer cannot encode is the client's mistake, and named: a 400, or a job's invalid file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.job_server import create_job, job_server, upload, wait_for_end
from support.tiny_bases import build_closed_tokenizer, build_model

from softprompt.base import freeze_base

SAID = r"the tokenizer of base 'words' cannot encode the text '.*zebra"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    base = freeze_base(build_model("gpt2"), build_closed_tokenizer(), name="words")
    with job_server(base, tmp_path_factory.mktemp("state")) as (client, _):
        yield client


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "the zebra ran"},
        {"prompt": ["the dog", "the zebra"]},
        {"prompt": "the zebra", "echo": True, "logprobs": 1, "max_tokens": 1},
    ],
)
def test_a_completion_of_a_word_outside_the_vocabulary_is_a_400(client: OpenAI, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=SAID):
        client.completions.create(model="base", **body)


def test_a_chat_with_a_word_outside_the_vocabulary_is_a_400_and_the_next_is_answered(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot encode"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "zebra"}])
    assert client.completions.create(model="base", prompt="the dog", max_tokens=2).usage


def test_a_job_on_a_word_outside_the_vocabulary_fails_and_names_the_row(client: OpenAI) -> None:
    file = upload(client, [{"text": "the dog ran"}, {"text": "the zebra ran"}, {"text": "the dog"}])
    found = wait_for_end(client, create_job(client, file).id)
    assert found.error is not None
    assert found.error.code == "invalid_file"
    assert "row 2" in found.error.message
    assert "zebra" in found.error.message
