"""An encoder behind the server: heads, label words and vectors as `softprompt predict` has them, and no generation."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator

import openai
import pytest
import torch
from support.app_server import AppServer, app_server, words
from support.encoders import build_encoder
from support.tiny_bases import random_ids, random_prompt

from softprompt.base import Base
from softprompt.config import PredictConfig
from softprompt.evaluation.predict import predict
from softprompt.families.task_head import task_head
from softprompt.prompt import Calibration, Judgement, SoftPrompt
from softprompt.types import InputForm, PromptRecord

HELD_OUT = Judgement(  # as a run leaves it in a prompt's record
    measure="accuracy", rows=20, train_rows=100, prompt=0.9, bare_base=0.5, better_rows=8, worse_rows=0,
    calibration=Calibration(temperature=2.5, right=tuple(0.5 + 0.02 * i for i in range(18)), wrong=(0.34, 0.42)),
)  # fmt: skip
FORMS = {
    "topics": InputForm(kind="template", template="{text}", completion="{label}", task="classify", pooling="cls",
                        labels=("a", "b", "c"), placement="after-cls"),
    "mood": InputForm(kind="template", template="{text} [MASK]", completion=" {label}", task="cloze",
                      labels=("bad", "good"), label_words=(("w9", "w7"), ("w8",)), placement="after-cls"),
    "sure": InputForm(kind="template", template="{a} w50 {b}", completion="{label}", task="classify", pooling="mean",
                      labels=("no", "yes")),
    "vectors": InputForm(kind="template", template="{anchor}", completion="{positive}", task="embed", pooling="mean"),
    "tags": InputForm(kind="template", template="{words}", completion="{tags}", task="tag", labels=("O", "X")),
}  # fmt: skip
TEXTS = [words(random_ids(length, length)) for length in (3, 7, 20, 1)]


@pytest.fixture(scope="module")
def bert() -> Base:
    return build_encoder("bert")


@pytest.fixture(scope="module")
def prompts(bert: Base) -> dict[str, SoftPrompt]:
    return {name: with_head(bert, form, seed, name == "topics") for seed, (name, form) in enumerate(FORMS.items())}


def with_head(base: Base, form: InputForm, seed: int, is_calibrated: bool = False) -> SoftPrompt:
    head = task_head(base, form)
    record = PromptRecord(form=form, run={"held_out": HELD_OUT.to_json()} if is_calibrated else {})
    return SoftPrompt(random_prompt(base, 2 + seed, seed), record, {} if head is None else head.start(seed))


@pytest.fixture(scope="module")
def server(bert: Base, prompts: dict[str, SoftPrompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(bert, tmp_path_factory.mktemp("state"), prompts) as found:
        yield found


def classified(server: AppServer, model: str, given: object) -> dict:
    answer = server.post("/v1/classify", {"model": model, "input": given})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(server: AppServer, path: str, **body) -> str:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["topics", "mood"])
def test_texts_are_classified_as_predict_does(server, bert, prompts, name):
    answer = classified(server, name, TEXTS)
    wanted = list(predict(bert, prompts[name], TEXTS, PredictConfig(probabilities=True)))
    assert answer["labels"] == list(wanted[0].probabilities) == list(FORMS[name].labels)
    assert answer["is_calibrated"] == (name == "topics")
    for found, one in zip(answer["data"], wanted, strict=True):
        assert found["label"] == one.label and found["num_classes"] == len(FORMS[name].labels)
        assert found["probs"] == pytest.approx(list(one.probabilities.values()), abs=2e-6)
        assert found["confidence"] == pytest.approx(one.confidence, abs=2e-6) and found["unsure"] == one.is_unsure
    assert answer["usage"]["prompt_tokens"] == sum(len(text.split()) + 2 + (name == "mood") for text in TEXTS)
    other = classified(server, "topics" if name == "mood" else "mood", TEXTS)
    assert other["data"][0]["probs"] != pytest.approx(answer["data"][0]["probs"], abs=1e-3)


def test_fields_and_token_ids_are_read_as_the_text_that_they_are(server, bert, prompts):
    (found,) = classified(server, "sure", {"a": TEXTS[0], "b": TEXTS[1]})["data"]
    (one,) = predict(bert, prompts["sure"], [{"a": TEXTS[0], "b": TEXTS[1]}], PredictConfig(probabilities=True))
    assert found["probs"] == pytest.approx(list(one.probabilities.values()), abs=2e-6)
    for name, behind in (("topics", ()), ("mood", (bert.mask_id,))):
        ids = [*bert.bos_ids, *bert.encode(TEXTS[1]), *behind, *bert.end_ids]
        (from_text,), (from_ids,) = (classified(server, name, given)["data"] for given in (TEXTS[1], ids))
        assert from_text == from_ids


@pytest.mark.parametrize("model", ["base", "vectors"])
def test_the_official_client_gets_vectors_as_numbers_and_as_base64(server, bert, prompts, model):
    given = TEXTS if model == "base" else TEXTS[:2]
    answer = server.client.embeddings.create(model=model, input=given)  # the client asks for base64
    as_floats = server.client.embeddings.create(model=model, input=given, encoding_format="float")
    raw = server.post("/v1/embeddings", {"model": model, "input": given, "encoding_format": "base64"}).json()
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text.split()) + 2 for text in given)
    for number, text in enumerate(given):
        expected = vector(bert, prompts, model, text)
        assert as_floats.data[number].embedding == pytest.approx(expected.tolist(), abs=1e-6)
        assert answer.data[number].embedding == as_floats.data[number].embedding
        packed = base64.b64decode(raw["data"][number]["embedding"])
        assert list(struct.unpack("<16f", packed)) == as_floats.data[number].embedding
        assert sum(value**2 for value in as_floats.data[number].embedding) == pytest.approx(1, abs=1e-5)
        assert (vector(bert, prompts, model, text + " w9") - expected).abs().max() > 1e-3  # the control
    ids = [*bert.bos_ids, *bert.encode(given[0]), *bert.end_ids]
    for one in (ids, [ids]):
        found = server.client.embeddings.create(model=model, input=one, dimensions=16).data
        assert found[0].embedding == pytest.approx(as_floats.data[0].embedding, abs=1e-6)


def vector(base: Base, prompts: dict[str, SoftPrompt], model: str, text: str) -> torch.Tensor:
    if model != "base":
        (found,) = predict(base, prompts[model], [text])
        return torch.tensor(found.embedding)
    with torch.no_grad():  # plain transformers
        ids = torch.tensor([[*base.bos_ids, *base.encode(text), *base.end_ids]])
        return torch.nn.functional.normalize(base.model.base_model(ids)[0][0].mean(dim=0), dim=0)


def test_what_it_cannot_do_is_refused_by_name(server):
    for path, body in (
        ("/v1/completions", {"prompt": "w5"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w5"}]}),
    ):
        assert "an encoder: it embeds texts and does not generate text" in refusal(server, path, model="base", **body)
        assert "'topics' classifies texts and does not generate" in refusal(server, path, model="topics", **body)
    assert "it embeds texts and does not classify texts" in refusal(server, "/v1/classify", model="base", input="w5")
    assert "'tags' tags words" in refusal(server, "/v1/classify", model="tags", input="w5")
    assert "'vectors' embeds texts" in refusal(server, "/v1/classify", model="vectors", input="w5")
    assert "'mood' classifies texts" in refusal(server, "/v1/embeddings", model="mood", input="w5")
    with pytest.raises(openai.BadRequestError, match="dimensions is 8, and the vectors of 'tiny-bert' have 16"):
        server.client.embeddings.create(model="base", input="w5", dimensions=8)


@pytest.mark.parametrize(
    ("model", "given", "word"),
    [
        ("topics", "", "text 0 is empty"),
        ("topics", ["w5", " "], "text 1 is empty"),
        ("topics", [[]], "text 0 has no token id"),
        ("topics", [5, 6, 3], "begins with the token id 5"),
        ("mood", [2, 5, 3], "has 0 masks"),
        ("mood", [2, 4, 4, 3], "has 2 masks"),
        ("topics", words(random_ids(93, 1)), "does not fit beside 2 virtual tokens"),
        ("topics", [2, *[5] * 94], "maximum context length is 96"),
        ("sure", "w5", "'a', 'b'"),
        ("sure", {"a": "w5"}, "no field 'b'"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused_in_words(server, model, given, word):
    assert word in refusal(server, "/v1/classify", model=model, input=given)


def test_models_say_their_kind_task_pooling_placement_and_labels(server):
    models = {model.id: model for model in server.client.models.list()}
    base = models["tiny-bert"]
    assert (base.base_kind, base.task, base.capabilities, base.pooling) == ("encoder", "embed", ["embed"], "mean")
    mood, topics, tags = models["mood"], models["topics"], models["tags"]
    assert (mood.task, mood.capabilities, mood.labels) == ("cloze", ["classify"], ["bad", "good"])
    assert (topics.task, topics.pooling, topics.placement) == ("classify", "cls", "after-cls")
    assert tags.capabilities == []
    found = server.http.get("/v1/prompts/mood").json()
    assert found["record"]["form"]["label_words"] == [["w9", "w7"], ["w8"]] and found["base_kind"] == "encoder"


def test_it_is_healthy_and_has_metrics(server):
    assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200
    classified(server, "topics", "w5")
    told = server.http.get("/metrics").text
    assert 'softprompt:request_success_total{finished_reason="stop",model_name="topics"}' in told
    assert "softprompt:num_requests_waiting 0.0" in told
