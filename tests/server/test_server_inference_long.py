"""Inputs that are much too long, or take long to read: refused early, read beside the event loop, given up with their
client.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from support.app_server import AppServer, app_server
from support.tiny_bases import build_base, random_prompt
from test_server_inference_leaving import asking, until
from transformers import PreTrainedTokenizerFast

from softprompt.base import Base
from softprompt.prompt import SoftPrompt

NESTED = "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"


class Tokenising:
    """Characters that a tokenizer is asked for. Held, it answers when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_characters = self.num_calls = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_held = threading.Event()
        call = PreTrainedTokenizerFast.__call__

        def counting(tokenizer: PreTrainedTokenizerFast, text: str, **options: object) -> object:
            self.num_characters += len(text)
            self.num_calls += 1
            if len(text) > 10_000 and not self.may_go_on.is_set():
                self.is_held.set()
                assert self.may_go_on.wait(20)
            return call(tokenizer, text, **options)

        monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)


@pytest.fixture
def tokenising(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokenising]:
    found = Tokenising(monkeypatch)
    yield found
    found.may_go_on.set()


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base(max_position_embeddings=6_000)


@pytest.fixture(scope="module")
def server(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    prompts = {"quotes": SoftPrompt(random_prompt(base, 4))}
    with app_server(base, tmp_path_factory.mktemp("state"), prompts) as server:
        yield server


def chat(*messages: dict[str, str], model: str = "base") -> dict[str, object]:
    return {"model": model, "messages": list(messages), "max_tokens": 1}


USER = {"role": "user", "content": "w3"}
HUGE = "w3 " * 5_000_000
SPACED = ("w3" + " " * 200) * 60  # few tokens of many characters
TOO_LONG = [
    ("/v1/completions", {"model": "base", "prompt": HUGE, "max_tokens": 1}),
    ("/v1/completions", {"model": "quotes", "prompt": ["w3", HUGE], "max_tokens": 1}),
    ("/v1/chat/completions", chat(USER | {"content": HUGE})),
    ("/v1/chat/completions", chat(USER | {"name": HUGE})),
    ("/v1/chat/completions", chat(USER | {"content": HUGE}, model="quotes")),
]


@pytest.mark.parametrize(("path", "body"), TOO_LONG, ids=["text", "texts", "message", "name", "plain"])
def test_an_input_certain_to_be_too_long_is_refused_untokenised(server, tokenising, path, body):
    refused = server.post(path, body)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["message"].startswith("This model's maximum context length is 6000 tokens. However")
    assert tokenising.num_characters < 1_000


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_only_the_beginning_of_a_too_long_text_is_tokenised(server, tokenising, path):
    text = "w3 " * 60_000
    body = {"model": "base", "prompt": text} if path == "/v1/completions" else chat(USER | {"content": text})
    refused = server.post(path, body)
    assert refused.status_code == 400 and "sent a text of at least " in refused.json()["error"]["message"]
    assert tokenising.num_characters < 60_000


def test_other_requests_are_answered_while_a_long_text_is_tokenised(server, tokenising):
    tokenising.may_go_on.clear()
    with asking(server, {"model": "base", "prompt": SPACED, "max_tokens": 1}) as connection:
        assert tokenising.is_held.wait(10)
        assert server.http.get("/health").status_code == 200
        assert server.post("/v1/completions", {"model": "base", "prompt": "w3", "max_tokens": 1}).status_code == 200
        tokenising.may_go_on.set()
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_has_one_long_text_tokenised_at_a_time_and_none_after_it_disconnects(server, tokenising):
    tokenising.may_go_on.clear()
    long = {"model": "base", "prompt": SPACED, "max_tokens": 1}
    with asking(server, long):
        assert tokenising.is_held.wait(10)
        num_calls = tokenising.num_calls
        for _ in range(3):
            with asking(server, long):
                pass
        assert server.http.get("/health").status_code == 200
        assert tokenising.num_calls == num_calls
        tokenising.may_go_on.set()
    until(lambda: server.post("/v1/completions", long).status_code == 200)
    assert tokenising.num_calls <= num_calls + 8


def test_a_disconnected_client_ends_the_tokenising_of_its_conversation(server, base, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", NESTED)
    until_read = chat(*[USER] * 2_000)
    with asking(server, until_read, "/v1/chat/completions"):
        assert server.http.get("/health").status_code == 200
    monkeypatch.undo()
    assert server.post("/v1/chat/completions", chat(*[USER] * 200)).status_code == 200


def test_a_chat_template_that_fails_or_does_not_end_is_a_400(server, base, monkeypatch):
    for template, told in {
        NESTED: "does not end", "{{ 1/0 }}": "ZeroDivisionError", "{{ nothing.at }}": "undefined",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}": "does not end",
    }.items():  # fmt: skip
        monkeypatch.setattr(base.tokenizer, "chat_template", template)
        refused = server.post("/v1/chat/completions", chat(*[USER] * 150))
        assert refused.status_code == 400 and told in refused.json()["error"]["message"]
    monkeypatch.setattr(base.tokenizer, "chat_template", {"rag": "x", "tool_use": "y"})
    refused = server.post("/v1/chat/completions", chat(USER))
    assert refused.status_code == 400 and "chat templates named 'rag', 'tool_use'" in refused.json()["error"]["message"]
