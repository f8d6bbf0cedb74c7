"""An encoder-decoder behind the server: its answers are the engine's, its labels those of label likelihood."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from support.app_server import AppServer, app_server, words
from support.seq2seq_bases import build_seq2seq
from support.tiny_bases import random_ids, random_prompt

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.engine import generate
from softprompt.evaluation import label_answers
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord

LABELS = (" w5", " w6 w7")
TEXTS = [words(random_ids(length, length)) for length in (3, 9, 5)]


@pytest.fixture(scope="module")
def base() -> Base:
    return build_seq2seq("t5")


@pytest.fixture(scope="module")
def prompts(base: Base) -> dict[str, SoftPrompt]:
    labels = InputForm(kind="template", template="w50 {text}", completion=" {label}", labels=LABELS)
    both = InputForm(has_decoder_prompt=True)
    return {
        "plain": SoftPrompt(random_prompt(base, 3, 1)),
        "both": SoftPrompt(random_prompt(base, 4, 2), PromptRecord(form=both)),
        "labels": SoftPrompt(random_prompt(base, 2, 3), PromptRecord(form=labels)),
    }


@pytest.fixture(scope="module")
def server(base: Base, prompts: dict[str, SoftPrompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(base, tmp_path_factory.mktemp("state"), prompts) as found:
        yield found


@pytest.mark.parametrize("model", ["base", "plain", "both"])
def test_texts_are_answered_as_by_the_engine_whole_and_streamed(server, base, prompts, model):
    sampling = SamplingConfig(max_new_tokens=6, ignore_eos=True)
    wanted = [answer.text for answer in generate(base, TEXTS, prompts.get(model), sampling)]
    how = {"model": model, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = server.client.completions.create(prompt=TEXTS, logprobs=1, **how)
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage.prompt_tokens == sum(len(text.split()) + 1 for text in TEXTS)  # and what ends each
    streamed = server.client.completions.create(prompt=TEXTS[0], stream=True, **how)
    assert "".join(event.choices[0].text for event in streamed) == wanted[0]
    ids = [*base.encode(TEXTS[0]), *base.end_ids]
    assert server.client.completions.create(prompt=ids, **how).choices[0].text == wanted[0]


def test_labels_have_the_probabilities_of_label_likelihood(server, base, prompts):
    (found,) = server.post("/v1/classify", {"model": "labels", "input": TEXTS[1]}).json()["data"]
    (answer,) = label_answers(base, [f"w50 {TEXTS[1]}"], LABELS, prompts["labels"])
    raw = server.post("/v1/classify", {"model": "labels", "input": TEXTS[1], "use_activation": False}).json()
    assert raw["data"][0]["probs"] == pytest.approx(list(answer.log_likelihoods.values()), abs=1e-5)
    assert found["label"] == answer.label.strip() and sum(found["probs"]) == pytest.approx(1)
    assert raw["usage"]["prompt_tokens"] == len(TEXTS[1].split()) + 2
    ids = [*base.encode(f"w50 {TEXTS[1]}"), *base.end_ids]
    (from_ids,) = server.post("/v1/classify", {"model": "labels", "input": ids}).json()["data"]
    assert from_ids == found


def test_the_last_message_goes_through_the_prompts_form_and_a_chat_through_the_default_template(server):
    messages = [{"role": "user", "content": "w7 w8"}]
    for model in ("labels", "base"):
        answer = server.client.chat.completions.create(model=model, messages=messages, max_tokens=4)
        assert answer.choices[0].message.content is not None
    assert server.client.chat.completions.create(model="plain", messages=messages).usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"extra_body": {"echo": True}}, "echo is not supported on an encoder-decoder"),
        ({"extra_body": {"echo": True, "logprobs": 1, "max_tokens": 0}}, "echo is not supported on an encoder-decoder"),
        ({"extra_body": {"suffix": "w5"}}, "suffix is not supported"),
    ],
)
def test_what_only_a_causal_base_can_do_is_refused_by_name(server, more, word):
    with pytest.raises(openai.BadRequestError, match=word):
        server.client.completions.create(model="plain", prompt="w5", **more)


def test_vectors_are_refused_and_the_models_say_so(server):
    answer = server.post("/v1/embeddings", {"model": "base", "input": "w5"})
    assert answer.status_code == 400 and "is an encoder-decoder: it generates text" in answer.json()["error"]["message"]
    models = {model.id: model for model in server.client.models.list()}
    assert models["labels"].capabilities == ["generate", "classify"] and models["labels"].base_kind == "seq2seq"
    assert server.http.get("/ready").status_code == 200
