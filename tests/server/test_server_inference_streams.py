"""Streams, put together, are the whole answers; what else the two endpoints write beside the text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest
from support.app_server import AppServer, app_server, events_of, words
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.base import Base, load_base
from softprompt.prompt import SoftPrompt
from softprompt.server.error_schemas import ErrorBody
from softprompt.server.inference.logprobs import text_offsets
from softprompt.server.inference.response_schema import ChatCompletion, Completion, ModelObject
from softprompt.server.inference.schema import ChatBody, CompletionBody

MULTI_BYTE = "wörld: 你好, 🙂👩‍🚀 – ça va?"


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base()


OPENAIS_OWN = ("reasoning_tokens", "audio_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")


@pytest.fixture(scope="module")
def server(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    prompts = {name: SoftPrompt(random_prompt(base, 4, seed)) for seed, name in enumerate(("quotes", "ft:tiny:a:1"))}
    with app_server(base, tmp_path_factory.mktemp("state"), prompts) as server:
        yield server


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """A base whose tokens are pieces of real text."""
    base = load_base("embedded", dtype="float32", device="cpu")
    with app_server(base, tmp_path_factory.mktemp("state"), {"p": SoftPrompt(random_prompt(base, 4))}) as server:
        yield server


def put_together(chunks):
    """{index: (text, log-probabilities, finish_reason, stop_reason)}"""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text, reports, *_ = found.get(choice.index, ("", []))
            piece = choice.text if hasattr(choice, "text") else choice.delta.content or ""
            if choice.logprobs is not None:
                reports = reports + (choice.logprobs.content if hasattr(choice.logprobs, "content") else
                                     list(zip(choice.logprobs.tokens, choice.logprobs.token_logprobs,
                                              choice.logprobs.text_offset, strict=True)))  # fmt: skip
            found[choice.index] = (text + piece, reports, choice.finish_reason, choice.stop_reason)
    return found


def test_a_stream_of_completions_is_the_whole_answer_in_pieces(server):
    asked = {"model": "quotes", "prompt": ["w5 w6", "w7"], "n": 2, "max_tokens": 9, "seed": 3, "logprobs": 2,
             "logit_bias": {"0": -100, "1": -100, "2": -100},
             "extra_body": {"ignore_eos": True, "stop_token_ids": [40, 41, 42, 43]}}  # fmt: skip
    whole = server.client.completions.create(**asked)
    found = put_together(server.client.completions.create(stream=True, **asked))
    for choice in whole.choices:
        text, reports, finish_reason, stop_reason = found[choice.index]
        assert (text, finish_reason, stop_reason) == (choice.text, choice.finish_reason, choice.stop_reason)
        assert [token for token, *_ in reports] == choice.logprobs.tokens
        assert [value for _, value, _ in reports] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
        assert [offset for *_, offset in reports] == choice.logprobs.text_offset
        text_tokens = choice.logprobs.tokens[: -1 if finish_reason == "stop" else None]
        assert "".join(text_tokens) == choice.text
        tops = zip(choice.logprobs.top_logprobs, choice.logprobs.tokens, strict=True)
        assert all(2 <= len(top) <= 3 and token in top for top, token in tops)


def test_a_stream_of_chat_is_the_whole_answer_in_pieces(server):
    asked = {"model": "quotes", "messages": [{"role": "user", "content": "w5 w6"}], "n": 3, "max_completion_tokens": 7,
             "seed": 3, "logprobs": True, "top_logprobs": 2}  # fmt: skip
    whole = server.client.chat.completions.create(**asked)
    chunks = list(server.client.chat.completions.create(stream=True, **asked))
    found = put_together(chunks)
    for choice in whole.choices:
        text, reports, finish_reason, _ = found[choice.index]
        assert (text, finish_reason) == (choice.message.content, choice.finish_reason)
        assert [token.token for token in reports] == [token.token for token in choice.logprobs.content]
        assert all(len(token.top_logprobs) == 2 and bytes(token.bytes).decode() == token.token for token in reports)
    first = {}
    for chunk in chunks:
        first.setdefault(chunk.choices[0].index, chunk.choices[0].delta)
    assert all(delta.role == "assistant" and delta.content == "" for delta in first.values())
    assert len(first) == 3 and len({chunk.id for chunk in chunks}) == 1


def test_the_usage_of_a_stream_comes_last_or_with_every_event(server):
    asked = {"model": "quotes", "prompt": "w5 w6", "max_tokens": 5, "ignore_eos": True, "stream": True}
    plain = events_of(server.post("/v1/completions", asked).text)
    assert plain[-1] is None and not any("usage" in event for event in plain[:-1])
    *events, last, done = events_of(
        server.post("/v1/completions", asked | {"stream_options": {"include_usage": True}}).text
    )
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0, "virtual_tokens": 4},
        "completion_tokens_details": dict.fromkeys(OPENAIS_OWN, 0),
    }
    assert (last["choices"], last["usage"], done) == ([], usage, None)
    assert all(event["usage"] is None for event in events)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, _ = events_of(server.post("/v1/completions", asked | {"stream_options": options}).text)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5, 5]


@pytest.mark.medium
def test_multi_byte_text_is_never_cut(written):
    asked = {"model": "p", "prompt": "Hello", "max_tokens": 200, "extra_body": {"guided_choice": [MULTI_BYTE]}}
    pieces = [chunk.choices[0].text for chunk in written.client.completions.create(stream=True, **asked)]
    assert "".join(pieces) == MULTI_BYTE and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 10
    reported = written.client.completions.create(logprobs=0, **asked).choices[0]
    assert reported.text == MULTI_BYTE and any(token.startswith("bytes:\\x") for token in reported.logprobs.tokens)
    chat = written.client.chat.completions.create(
        model="p", messages=[{"role": "user", "content": "Hi"}], logprobs=True, max_tokens=200,
        extra_body={"structured_outputs": {"choice": [MULTI_BYTE]}},
    )  # fmt: skip
    assert chat.choices[0].message.content == MULTI_BYTE
    assert b"".join(bytes(token.bytes) for token in chat.choices[0].logprobs.content).decode() == MULTI_BYTE


@pytest.mark.medium
def test_an_answer_follows_a_json_schema(written):
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}, "is_long": {"type": "boolean"}},
              "required": ["mood", "is_long"], "additionalProperties": False}  # fmt: skip
    response_format = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}}
    ways = [{"response_format": response_format}, {"extra_body": {"guided_json": schema}},
            {"extra_body": {"structured_outputs": {"json": json.dumps(schema)}}}]  # fmt: skip
    for way in ways:
        answer = written.client.chat.completions.create(
            model="p", messages=[{"role": "user", "content": "Hi"}], max_tokens=100, **way
        )
        found = json.loads(answer.choices[0].message.content)
        assert found["mood"] in ("good", "bad") and isinstance(found["is_long"], bool)
    free = written.client.chat.completions.create(
        model="p", messages=[{"role": "user", "content": "Hi"}], max_tokens=10, response_format={"type": "json_object"}
    )
    assert free.choices[0].message.content.startswith("{")


HOSTILE_SCHEMAS = {
    "a reference to itself": ({"$ref": "#"}, "no text satisfies it"),
    "unsatisfiable": ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable schema"),
    "a number that no float is": ({"type": "number", "maximum": 10**400}, "number out of range"),
    "nested": (json.loads('{"items":' * 130 + "{}" + "}" * 130), "nested more than 120 levels"),
    "too many keys": (
        {"type": "object", "properties": {f"k{number}": {"type": "null"} for number in range(1100)}},
        "cannot be followed any further: .*max is 2000",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(written, name):
    schema, why = HOSTILE_SCHEMAS[name]
    asked = {"model": "p", "prompt": "Hi", "max_tokens": 9, "guided_json": schema}
    answer = written.post("/v1/completions", asked)
    assert answer.status_code == 400 and re.search(why, answer.json()["error"]["message"]), answer.text
    streamed = written.post("/v1/completions", asked | {"stream": True})
    told = answer.json() if streamed.status_code == 400 else events_of(streamed.text)[-2]
    assert re.search(why, told["error"]["message"]) and told["error"]["type"] == "invalid_request_error"
    written.until_idle()


def test_a_stop_string_ends_the_answer_and_is_its_stop_reason(server, base):
    long = server.client.completions.create(
        model="quotes", prompt="w5 w6", max_tokens=20, seed=1, extra_body={"ignore_eos": True}
    ).choices[0]
    third = long.text.split()[2]
    asked = {"model": "quotes", "prompt": "w5 w6", "max_tokens": 20, "seed": 1, "stop": ["never", third],
             "extra_body": {"ignore_eos": True}}  # fmt: skip
    answer = server.client.completions.create(**asked).choices[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (long.text.split(third)[0], "stop", third)
    assert put_together(server.client.completions.create(stream=True, **asked))[0][0] == answer.text
    token = base.tokenizer.convert_tokens_to_ids(third)
    asked = {**asked, "stop": None, "extra_body": {"ignore_eos": True, "stop_token_ids": [token]}}
    answer = server.client.completions.create(**asked).choices[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token)


def test_echo_puts_the_prompt_before_each_answer(server):
    asked = {"model": "quotes", "max_tokens": 4, "seed": 1, "n": 2, "extra_body": {"ignore_eos": True}}
    plain = server.client.completions.create(prompt=["w5  w6", "w7"], **asked)
    echoed = server.client.completions.create(prompt=["w5  w6", "w7"], echo=True, **asked)
    expected = [text + choice.text for choice, text in zip(plain.choices, ["w5  w6"] * 2 + ["w7"] * 2, strict=True)]
    assert [choice.text for choice in echoed.choices] == expected
    streamed = put_together(server.client.completions.create(prompt=["w5  w6", "w7"], echo=True, stream=True, **asked))
    assert [streamed[index][0] for index in range(4)] == expected
    alone = server.client.completions.create(model="quotes", prompt=[1, 5, 6], echo=True, max_tokens=0)
    assert (alone.choices[0].text, alone.choices[0].finish_reason) == ("w5 w6", "length")
    assert alone.usage.completion_tokens == 0 and alone.usage.prompt_tokens == 3


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_log_probabilities_of_an_echo_stand_before_those_of_each_answer(server, max_tokens):
    asked = {"model": "quotes", "prompt": ["w5  w6", "w7", ""], "n": 2, "max_tokens": max_tokens, "seed": 3,
             "logprobs": 2, "extra_body": {"ignore_eos": True}}  # fmt: skip
    plain = server.client.completions.create(**{**asked, "max_tokens": max(1, max_tokens)})
    whole = server.client.completions.create(echo=True, **asked)
    chunks = list(server.client.completions.create(echo=True, stream=True, **asked))
    streamed = put_together(chunks)
    texts = [(["<s>", " w5", " w6"], "w5  w6", [0, 0, 2]), (["<s>", " w7"], "w7", [0, 0]), (["<s>"], "", [0])]
    for choice, alone in zip(whole.choices, plain.choices, strict=True):
        tokens, words, places = texts[choice.index // 2]
        found = choice.logprobs
        answered = (alone.logprobs if max_tokens else None, alone.text if max_tokens else "")
        assert choice.text == words + answered[1] == streamed[choice.index][0]
        assert found.tokens == tokens + (answered[0].tokens if max_tokens else [])
        assert found.text_offset == places + [
            len(words) + index for index in (answered[0].text_offset if max_tokens else [])
        ]
        assert None not in found.token_logprobs and len(found.top_logprobs) == len(found.tokens)
        assert found.token_logprobs[len(tokens) :] == pytest.approx(
            answered[0].token_logprobs if max_tokens else [], abs=1e-5
        )
        reports = [list(part) for part in zip(*streamed[choice.index][1], strict=True)]
        assert reports[0] == found.tokens and reports[2] == found.text_offset
        assert reports[1] == pytest.approx(found.token_logprobs, abs=1e-5)
        first = next(chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index)
        assert (first.text, first.logprobs.tokens) == (words, tokens)
        assert choice.finish_reason == streamed[choice.index][2] == "length"
    assert whole.usage.completion_tokens == 6 * max_tokens and whole.usage.prompt_tokens == 3 + 2 + 1


def test_the_first_echoed_token_on_the_bare_base_has_no_log_probability(server):
    asked = {"model": "base", "prompt": [5, 6], "max_tokens": 0, "logprobs": 1, "echo": True}
    answer = server.post("/v1/completions", asked)
    found = Completion.model_validate_json(answer.text, extra="forbid").choices[0].logprobs
    assert (found.token_logprobs[0], found.top_logprobs[0], found.tokens[0]) == (None, None, " w5")
    assert found.token_logprobs[1] < 0


@pytest.mark.medium
def test_text_offsets_point_at_their_tokens_in_real_text(written):
    for prompt in (MULTI_BYTE, "The man <s> who\n\n  moves </s> a mountain.", " begins with a space", "\t"):
        choice = written.client.completions.create(
            model="p", prompt=prompt, max_tokens=6, seed=1, logprobs=0, echo=True
        ).choices[0]
        found = choice.logprobs
        assert choice.text.startswith(prompt) and found.text_offset == sorted(found.text_offset)
        num_text = sum(offset < len(prompt) for offset in found.text_offset)
        whole = [index for index, token in enumerate(found.tokens) if not token.startswith("bytes:")]
        assert num_text > 1 or prompt == "\t"
        for index in whole:
            offset, token = found.text_offset[index], found.tokens[index]
            assert choice.text[offset : offset + len(token)] == token or offset == found.text_offset[index + 1], token


def test_text_offsets_recover_after_characters_that_the_tokenizer_changed():
    said = [b"", b"A", b" cafe", b" \xe2\x82", b"\xac", b"?", b" d\xc3\xa9j\xc3\xa0", b"unk"]
    assert text_offsets("A  caf\u00e9 \u20ac? d\u00e9j\u00e0", said) == [0, 0, 1, 7, 8, 9, 10, 15]
    assert text_offsets("", [b"", b"x"]) == [0, 0]
    assert text_offsets("foo w6", [b"", b" w6"]) == [0, 3]


def test_each_choice_of_a_stream_ends_as_soon_as_it_is_finished(server):
    asked = {"model": "quotes", "prompt": ["w5", "w8 w9"], "n": 4, "max_tokens": 40, "seed": 2, "temperature": 1.5,
             "extra_body": {"stop_token_ids": list(range(3, 20))}}  # fmt: skip
    chunks = [chunk.choices[0] for chunk in server.client.completions.create(stream=True, **asked)]
    ends = [number for number, choice in enumerate(chunks) if choice.finish_reason is not None]
    assert sorted(chunks[number].index for number in ends) == list(range(8))
    for number in ends:
        assert all(choice.index != chunks[number].index for choice in chunks[number + 1 :])
    assert ends[0] < len(chunks) - 8, "they were told together"
    chat = server.client.chat.completions.create(
        model="quotes", messages=[{"role": "user", "content": "w5"}], n=4, max_tokens=40, seed=2, temperature=1.5,
        stream=True, extra_body={"stop_token_ids": list(range(3, 20))},
    )  # fmt: skip
    is_end = [chunk.choices[0].finish_reason is not None for chunk in chat]
    assert sum(is_end) == 4 and True in is_end[:-4]


def test_bos_is_added_to_texts_and_not_to_ids(server):
    def ask(prompt, **settings):
        answer = server.client.completions.create(
            model="quotes", prompt=prompt, max_tokens=6, temperature=0, logprobs=0,
            extra_body={"ignore_eos": True, **settings},
        )  # fmt: skip
        return answer.usage.prompt_tokens, answer.choices[0].logprobs.token_logprobs

    ids = random_ids(4)
    with_bos, without = ask([1, *ids]), ask(list(ids))
    assert ask(words(ids)) == with_bos and ask(words(ids), add_special_tokens=False) == without
    assert (with_bos[0], without[0]) == (5, 4) and with_bos[1] != without[1]
    assert ask([list(ids)]) == without


def test_the_async_client_streams_too(server):
    async def ask():
        async with server.async_client() as client:
            stream = await client.completions.create(model="quotes", prompt="w5", max_tokens=5, seed=2, stream=True)
            pieces = [chunk.choices[0].text async for chunk in stream]
            whole = await client.completions.create(model="quotes", prompt="w5", max_tokens=5, seed=2)
            return "".join(pieces), whole.choices[0].text

    streamed, whole = asyncio.run(ask())
    assert streamed == whole


def test_responses_match_their_published_schemas(server):
    whole = {"model": "quotes", "max_tokens": 3, "n": 2}
    completion = server.post("/v1/completions", whole | {"prompt": "w3", "logprobs": 1})
    assert Completion.model_validate_json(completion.text, extra="forbid").usage.completion_tokens <= 6
    messages = [{"role": "user", "content": "w3"}]
    chat = server.post("/v1/chat/completions", whole | {"messages": messages, "logprobs": True})
    assert ChatCompletion.model_validate_json(chat.text, extra="forbid").object == "chat.completion"
    refused = server.post("/v1/completions", whole)
    assert ErrorBody.model_validate_json(refused.text, extra="forbid").error.param == "prompt"
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    bodies = {"CompletionBody": CompletionBody, "ChatBody": ChatBody, "Completion": Completion,
              "ChatCompletion": ChatCompletion, "ErrorBody": ErrorBody, "ModelObject": ModelObject}  # fmt: skip
    for name, body in bodies.items():
        assert all(body.model_validate(example, extra="forbid") for example in schemas[name]["examples"]), name
        fields = schemas[name]["properties"].items()
        assert all("description" in field for key, field in fields if "Body" in name and key != "error"), name


def test_models_are_listed_with_their_records(server, base):
    models = {model.id: model for model in server.client.models.list()}
    assert list(models) == ["tiny-llama", "quotes", "ft:tiny:a:1"]
    bare, quotes = models["tiny-llama"], models["quotes"]
    assert (bare.object, bare.source, bare.num_virtual_tokens, bare.base_fingerprint) == (
        "model", "base", 0, base.fingerprint)  # fmt: skip
    assert (quotes.num_virtual_tokens, quotes.shared, quotes.pinned) == (4, True, False)
    assert quotes.form["kind"] == "plain" and len(quotes.content_hash) == 64 and quotes.parent is None
    assert server.client.models.retrieve("ft:tiny:a:1").id == "ft:tiny:a:1"
    assert server.client.models.retrieve("base").id == "tiny-llama"
    assert server.http.get("/v1/models/org/name").status_code == 404
