"""/v1/classify and /v1/embeddings: the library's own numbers, alone or mixed, behind the same keys and limits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import httpx2
import pytest
from support.app_server import AppServer, app_server, words
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.base import Base
from softprompt.config import EngineConfig
from softprompt.evaluation import label_answers
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord

LABELS = (" w5", " w6 w7", " w8")
FORM = InputForm(kind="template", template="w50 {text} w51", completion=" {label}", labels=LABELS)
PAIR = InputForm(kind="template", template="{a} w50 {b}", completion=" {label}", labels=LABELS[:2])


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base()


@pytest.fixture(scope="module")
def prompts(base: Base) -> dict[str, SoftPrompt]:
    found = {name: SoftPrompt(random_prompt(base, 3, seed), PromptRecord(form=FORM)) for seed, name in
             enumerate(("reviews", "topics"))}  # fmt: skip
    found["pairs"] = SoftPrompt(random_prompt(base, 2, 9), PromptRecord(form=PAIR))
    found["plain"] = SoftPrompt(random_prompt(base, 2, 8))
    return found


@pytest.fixture(scope="module")
def server(base: Base, prompts: dict[str, SoftPrompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(base, tmp_path_factory.mktemp("state"), prompts, requests_per_minute=None) as found:
        yield found


def text(seed: int, length: int = 5) -> str:
    return words(random_ids(length, seed))


def shares(base: Base, prompt: SoftPrompt, written: str) -> list[float]:
    """The probabilities of the labels by the library."""
    (answer,) = label_answers(base, [written], prompt.record.form.labels, prompt)
    weights = [math.exp(value) for value in answer.log_likelihoods.values()]
    return [weight / sum(weights) for weight in weights]


def post(server: AppServer, **body) -> dict:
    answer = server.post("/v1/classify", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(server: AppServer, path: str = "/v1/classify", **body) -> tuple[int, dict]:
    answer = server.post(path, body)
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_texts_have_the_probabilities_of_the_library_in_vllms_shape(server, base, prompts, path):
    texts = [text(1), text(2, 7)]
    answer = server.post(path, {"model": "reviews", "input": texts}).json()
    assert answer["object"] == "list" and answer["id"].startswith("classify-") and answer["model"] == "reviews"
    assert answer["labels"] == ["w5", "w6 w7", "w8"]
    for index, (found, written) in enumerate(zip(answer["data"], texts, strict=True)):
        expected = shares(base, prompts["reviews"], f"w50 {written} w51")
        assert found["index"] == index and found["num_classes"] == 3
        assert found["probs"] == pytest.approx(expected, abs=1e-6)
        assert found["label"] == answer["labels"][expected.index(max(expected))]
        assert found["confidence"] == round(max(found["probs"]), 6) and found["unsure"] is None
        assert found["probs"] != pytest.approx(shares(base, prompts["topics"], f"w50 {written} w51"), abs=1e-4)
    num_tokens = 2 + 2 * 2 + 5 + 7  # BOS and the template's words of each
    assert answer["usage"] == {
        "prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": 0, "virtual_tokens": 6},
    }  # fmt: skip


def test_one_text_token_ids_and_fields_by_name_are_read_too(server, base, prompts):
    whole = base.bos_ids + base.encode(f"w50 {text(3)} w51")
    (from_text,) = post(server, model="reviews", input=text(3))["data"]
    (from_ids,) = post(server, model="reviews", input=list(whole))["data"]
    assert from_text == from_ids
    found = post(server, model="reviews", input=[list(whole), [1, 50, 9, 51]])
    assert found["data"][0]["probs"] == pytest.approx(from_text["probs"], abs=1e-6)
    assert found["usage"]["prompt_tokens"] == len(whole) + 4
    (pair,) = post(server, model="pairs", input={"a": "w3", "b": "w4"})["data"]
    assert pair["probs"] == pytest.approx(shares(base, prompts["pairs"], "w3 w50 w4"), abs=1e-6)
    (raw,) = post(server, model="reviews", input=text(3), use_activation=False)["data"]
    assert max(raw["probs"]) < 0 and raw["label"] == from_text["label"] and raw["confidence"] is None


def test_many_clients_at_once_beside_answers_get_each_what_they_get_alone(server, base, prompts):
    cases = [(name, text(seed)) for seed in range(8) for name in ("reviews", "topics")]

    async def ask() -> list[list[float]]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http, server.async_client() as client:
            asked = [http.post("/v1/classify", json={"model": name, "input": one}) for name, one in cases]
            generating = client.completions.create(model="plain", prompt="w5", max_tokens=40)
            *answers, _ = await asyncio.gather(*asked, generating)
            return [answer.json()["data"][0]["probs"] for answer in answers]

    for (name, one), found in zip(cases, asyncio.run(ask()), strict=True):
        assert found == pytest.approx(shares(base, prompts[name], f"w50 {one} w51"), abs=1e-6)


def test_what_a_model_cannot_do_is_refused_by_name(server):
    status, error = refused(server, model="plain", input="w5")
    assert (status, error["param"], error["code"]) == (400, "model", "unsupported_model")
    assert "'plain' generates text and does not classify texts; use /v1/completions" in error["message"]
    status, error = refused(server, model="base", input="w5")
    assert status == 400 and "is a causal language model: it generates text" in error["message"]
    for model in ("base", "plain", "reviews"):
        status, error = refused(server, "/v1/embeddings", model=model, input="w5")
        assert status == 400 and "does not embed texts" in error["message"]
    models = {model.id: model for model in server.client.models.list()}
    assert models["reviews"].capabilities == ["generate", "classify"]
    assert (models["plain"].capabilities, models["reviews"].labels) == (["generate"], ["w5", "w6 w7", "w8"])
    assert server.http.get("/v1/prompts/reviews").json()["capabilities"] == ["generate", "classify"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input": text(1, 200)}, "maximum context length is 96"),
        ({"input": [[3] * 200]}, "maximum context length is 96"),
        ({"input": [3, 97]}, "token id 97"),
        ({"input": [3, "w5"]}, "item 0 of input is a int|has a str at index 1"),
        ({"input": [3, True]}, "has a bool at index 1"),
        ({"input": []}, "input holds 0 texts"),
        ({"input": 5}, "input is a int"),
        ({"input": {"a": "w5"}}, "asks for 'text'"),
        ({"input": {"text": 5}}, "has a int in the field 'text'"),
        ({"input": "\ud800"}, "half a surrogate pair"),
        ({"input": "w5", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens is not supported"),
        ({"input": "w5", "add_special_tokens": False}, "add_special_tokens"),
        ({"input": "w5", "priority": "high"}, "priority"),
        ({}, "input is missing"),
    ],
)
def test_bodies_that_cannot_be_answered_are_refused_in_words(server, body, word):
    status, error = refused(server, model="reviews", **body)
    assert status == 400
    assert any(each in error["message"] for each in word.split("|")), error
    assert error.keys() == {"message", "type", "param", "code"}


def test_a_form_of_several_fields_asks_for_each_by_its_name(server):
    status, error = refused(server, model="pairs", input="w5")
    assert status == 400 and "'a', 'b'" in error["message"]


def test_limits_the_log_and_the_metrics_count_these_requests_too(base, prompts, tmp_path, caplog):
    with app_server(base, tmp_path / "state", prompts, tokens_per_minute=20, max_concurrent=3) as server:
        status, error = refused(server, model="reviews", input=[text(1)] * 4)
        assert (status, error["code"]) == (400, "too_many_answers")
        with caplog.at_level("INFO"):
            answer = server.post("/v1/classify", {"model": "reviews", "input": [text(1)] * 3})
        assert answer.status_code == 200
        status, error = refused(server, model="reviews", input=text(1))
        assert (status, error["code"]) == (429, "rate_limit_exceeded")
        lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
        (fields,) = [each for each in lines if each["status"] == 200]  # a refusal's line may come late
        assert (fields["route"], fields["model"], fields["prompt_tokens"]) == ("/v1/classify", "reviews", 24)
        told = server.http.get("/metrics").text
        assert 'softprompt:prompt_tokens_total{model_name="reviews"} 24.0' in told
        assert 'softprompt:request_success_total{finished_reason="stop",model_name="reviews"} 1.0' in told


def test_a_full_queue_is_503_and_a_client_that_disconnects_frees_it(base, prompts, tmp_path):
    config = EngineConfig(max_waiting=40, max_step_tokens=1)  # a row or two in each step
    with app_server(base, tmp_path / "state", prompts, config) as server:
        status, error = refused(server, model="reviews", input=[text(1)] * 41)
        assert (status, error["code"]) == (503, "queue_full")

        async def leave() -> None:
            async with httpx2.AsyncClient(base_url=server.url) as http:
                body = {"model": "reviews", "input": [text(1, 60)] * 40}
                task = asyncio.create_task(http.post("/v1/classify", json=body))
                while not (await asyncio.to_thread(server.stats)).num_waiting:
                    pass
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(asyncio.wait_for(leave(), 20))
        server.until_idle()
        assert server.stats().num_aborted > 0
