"""What a client gets for what cannot be meant: one sentence that says what was wrong, in OpenAI's envelope."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from support.app_server import AppServer, app_server
from support.tiny_bases import build_base, random_prompt

from softprompt.prompt import SoftPrompt
from softprompt.server.clients.auth import current_client
from softprompt.server.clients.keys import Client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    base = build_base()
    prompts = {"quotes": SoftPrompt(random_prompt(base, 4)), "coach": SoftPrompt(random_prompt(base, 4))}
    with app_server(base, tmp_path_factory.mktemp("state"), prompts) as server:
        yield server


NAN = float("nan")
DEEP = json.loads("[" * 300 + "]" * 300)
BAD_FIELDS = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": 97}, "97"),
    ({"max_tokens": 10**30}, "63 bits"),
    ({"n": 0}, "n is"),
    ({"n": 129}, "n is"),
    ({"n": 10**30}, "n is"),
    ({"temperature": NAN}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"repetition_penalty": 1e300}, "repetition_penalty"),
    ({"\ud800": 1}, "body"),
    ({"structured_outputs": {"\ud800": 1}}, "structured_outputs"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -NAN}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": NAN}}, "logit_bias"),
    ({"logit_bias": {"5": "much"}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"97": 1}}, "97"),
    ({"logit_bias": {"-1": 1}}, "-1"),
    ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
    ({"logit_bias": [1, 2]}, "logit_bias"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "\udc00"}, "stop"),
    ({"stop_token_ids": [97]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["w5"], "guided_json": {}}, "json_schema"),
    ({"guided_choice": ["\ud800"]}, "guided_choice"),
    ({"guided_json": "{"}, "json_schema"),
    ({"guided_json": {"a": NAN}}, "schema"),
    ({"guided_json": {"type": "nothing"}}, "json_schema"),
    ({"guided_json": {"a": DEEP}}, "json_schema"),
    ({"guided_json": {"a": "x" * 32_001}}, "characters"),
    ({"guided_choice": ["x" * 4000] * 9}, "characters"),
    ({"guided_regex": "a+"}, "guided_regex"),
    ({"structured_outputs": {"regex": "a+"}}, "regex"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"user": 5}, "user"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"model": "x" * 513}, "model"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
]  # fmt: skip
BAD_PROMPTS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "int"),
    ({"prompt": {}}, "dict"),
    ({"prompt": []}, "0 texts"),
    ({"prompt": ["w3", 5]}, "item 1"),
    ({"prompt": [5, "w3"]}, "index 1"),
    ({"prompt": [True]}, "bool"),
    ({"prompt": [[3], [4.0]]}, "float"),
    ({"prompt": [[3, None]]}, "NoneType"),
    ({"prompt": [97]}, "97"),
    ({"prompt": [3, -1]}, "-1"),
    ({"prompt": [3, 10**30]}, "token id 1000000000"),
    ({"prompt": "\ud800 w3"}, "surrogate"),
    ({"prompt": ["w3", "w3 \udfff"]}, "text 1"),
    ({"prompt": ["w3"] * 1025}, "1025"),
    ({"prompt": ["w3"] * 1000, "n": 2}, "2000"),
    ({"prompt": "w3 " * 400_000}, "maximum context length is 96 tokens"),
    ({"prompt": [3] * 1_000_000}, "maximum context length is 96 tokens"),
    ({"model": "base", "prompt": [[]]}, "empty"),
    ({"suffix": "the end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True, "logprobs": 1, "prompt": [3] * 92, "max_tokens": 0}, "requested 97 tokens"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"echo": True, "logprobs": 20, "prompt": [[3] * 80] * 20, "n": 16}, "537600 log-probabilities"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"priority": 2**31}, "priority"),
]  # fmt: skip
USER = {"role": "user", "content": "w3"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
BAD_MESSAGES = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "w3"}, "messages"),
    ({"messages": [5]}, "messages"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": None}]}, "content"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is missing; give it, or tool_calls"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "content is missing"),
    ({"messages": [USER | {"tool_calls": [TOOL]}]}, "tool_calls are the assistant's, and the role is 'user'"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "\ud800"}]}]}, "surrogate"),
    ({"messages": [USER, {"role": "tool", "content": "w3", "tool_call_id": "\ud800"}]}, "tool_call_id"),
    ({"messages": [{"role": "robot", "content": "w3"}]}, "role"),
    ({"messages": [{"role": "function", "content": "w3"}]}, "role"),
    ({"messages": [{"role": "system", "content": "w3"}]}, "user message"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"messages": [{**USER, "name": "\ud800"}]}, "surrogate"),
    ({"messages": [{**USER, "\ud800": 1}]}, "messages"),
    ({"messages": [USER] * 10_001}, "10000"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
    ({"model": "base", "messages": [USER, {"role": "assistant", "tool_calls": [TOOL]}]}, "tool_calls cannot be read"),
    ({"tools": [TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [TOOL]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 1000}, "1000"),
    ({"messages": [{"role": "user", "content": "w3 " * 100}]}, "maximum context length is 96 tokens"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
]  # fmt: skip


def named(cases):
    return [pytest.param(*case, id=f"{number}-{','.join(case[0])}") for number, case in enumerate(cases)]


def refusal(answer, status=400):
    """The message of an error in the envelope."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400 and "\n" not in error["message"] and "Traceback" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(("fields", "says"), named(BAD_FIELDS + BAD_PROMPTS))
def test_a_completion_with_an_invalid_field_is_refused_with_a_reason(server, fields, says):
    asked = {"model": "quotes", "prompt": "w3", "max_tokens": 2}
    assert says in refusal(server.post("/v1/completions", asked | fields))


@pytest.mark.parametrize(("fields", "says"), named(BAD_FIELDS + BAD_MESSAGES))
def test_a_chat_with_an_invalid_field_is_refused_with_a_reason(server, fields, says):
    asked = {"model": "quotes", "messages": [USER], "max_tokens": 2}
    assert says in refusal(server.post("/v1/chat/completions", asked | fields))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"n":' + b"9" * 5000 + b"}"],
    ids=["empty", "open", "list", "number", "text", "null", "not-utf8", "deep", "digits"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_that_is_no_object_is_refused(server, path, body):
    refusal(server.post(path, body))


def test_unsupported_fields_with_neutral_values_are_accepted(server):
    harmless = {"tools": [], "tool_choice": "none", "suffix": "", "store": True, "metadata": {"a": "b"},
                "logit_bias": {}, "service_tier": "auto", "something_new": {"x": 1}, "stop": None, "n": None,
                "temperature": 0, "logprobs": None, "best_of": 1, "response_format": {"type": "text"}}  # fmt: skip
    asked = {"model": "quotes", "prompt": "w3", "max_tokens": 2, **harmless}
    assert server.post("/v1/completions", asked).status_code == 200
    # behind a soft prompt an empty text is one: there is something to continue
    assert server.post("/v1/completions", {"model": "quotes", "prompt": [[]], "max_tokens": 2}).status_code == 200


def test_an_unknown_model_is_answered_with_the_nearest_names(server):
    with pytest.raises(openai.NotFoundError, match=r"no model 'quots'.*'quotes'") as told:
        server.client.completions.create(model="quots", prompt="w3")
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="coach"):
        server.client.models.retrieve("coahc")


def test_only_an_admin_may_give_a_priority_below_0(server):
    asked = {"model": "quotes", "prompt": "w3", "max_tokens": 1}
    assert server.post("/v1/completions", asked | {"priority": -1}).status_code == 200
    server.app.dependency_overrides[current_client] = lambda: Client("key-1", "someone", is_admin=False)
    try:
        assert "priority is -1" in refusal(server.post("/v1/completions", asked | {"priority": -1}))
        assert server.post("/v1/completions", asked | {"priority": 1}).status_code == 200
    finally:
        server.app.dependency_overrides.clear()


def test_a_refusal_by_the_engine_names_the_field_of_the_request(server):
    """With HTTP's name for it, in the message too."""
    asked = {"model": "quotes", "prompt": "w3", "max_tokens": 8}
    for fields, param, code in (
        ({"min_tokens": 9}, "min_tokens", "invalid_value"),
        ({"max_tokens": 97}, "max_tokens", "context_length_exceeded"),
        ({"stop_token_ids": [97]}, "stop_token_ids", "invalid_value"),
        ({"logit_bias": {"97": 1}}, "logit_bias", "invalid_value"),
        ({"prompt": [97]}, "prompt", "invalid_value"),
        ({"model": "base", "prompt": [[]]}, "prompt", "invalid_value"),
    ):
        error = server.post("/v1/completions", asked | fields).json()["error"]
        assert (error["param"], error["code"]) == (param, code), error
        assert "min_new_tokens" not in error["message"] and "max_new_tokens" not in error["message"]


def test_the_server_still_answers_after_all_invalid_requests(server):
    answer = server.client.completions.create(model="quotes", prompt="w3", max_tokens=2)
    assert answer.usage.prompt_tokens == 2
    server.until_idle()
