"""What programs that speak OpenAI's API send, as their sources have it, and what they read of the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.app_server import AppServer, app_server, events_of, words
from support.tiny_bases import build_base, build_model

from softprompt.base import Base
from softprompt.config import EngineConfig, TrainConfig
from softprompt.data import rows_from_records
from softprompt.families.native import native_library
from softprompt.prompt import SoftPrompt
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError
from softprompt.server.inference.tokenise import conversation_ids
from softprompt.server.prompts.model import Model
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.storage import save_prompt
from softprompt.training import train

QUESTIONS = [((5 + number, 20 + number), (40 + number, 60 + number, 80 + number % 2)) for number in range(6)]
LOOSE, TIGHT = 1e-2, 1e-4


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base()


@pytest.fixture(scope="module")
def prompts(base: Base) -> dict[str, SoftPrompt]:
    """One that was trained to answer and to end, and a stranger to that."""
    records = [{"prompt": words(asked), "completion": f" {words(answer)}"} for asked, answer in QUESTIONS]
    rows = rows_from_records(records, template="{prompt}", completion="{completion}")
    config = TrainConfig(virtual_tokens=8, epochs=60, eos=True, eos_weight=1.0, relative_learning_rate=1.0)
    return {"ends": train(base, rows, config).prompt, "other": train(base, ["w7 w8 w9"], TrainConfig(epochs=1)).prompt}


@pytest.fixture(scope="module")
def place(
    base: Base, prompts: Mapping[str, SoftPrompt], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AppServer]:
    with app_server(base, tmp_path_factory.mktemp("state"), prompts) as place:
        yield place


def contexts(base: Base) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each question with its right answer, and with a wrong one."""
    pairs = [(asked, each[1]) for asked, _ in QUESTIONS for each in QUESTIONS[:2]]
    right = [(asked, answer) for asked, answer in QUESTIONS]
    return [(base.bos_ids + asked, answer) for asked, answer in (*right, *pairs)]


def lm_eval_request(model: str, rows: list[list[int]]) -> dict[str, Any]:
    """lm-evaluation-harness, `local-completions`, a log-likelihood."""
    return {"model": model, "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
            "echo": True}  # fmt: skip


def lm_eval_log_likelihoods(answer: Any, context_lengths: list[int]) -> list[float]:
    """As it reads them: the last entry is the generated token's."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [sum(choice["logprobs"]["token_logprobs"][length:-1])
            for choice, length in zip(choices, context_lengths, strict=True)]  # fmt: skip


@torch.no_grad()
def pefts_log_likelihoods(prompt: SoftPrompt, base: Base, folder: Path) -> list[float]:
    """Of PEFT's own model, loaded from the adapter's folder."""
    model = PeftModel.from_pretrained(build_model("llama"), str(save_prompt(prompt, folder, base=base))).eval()
    found = []
    for context, answer in contexts(base):
        logits = model(input_ids=torch.tensor([context + answer])).logits[0]
        rows = torch.log_softmax(logits[-len(answer) - 1 : -1].float(), dim=-1)
        found.append(float(rows[range(len(answer)), list(answer)].sum()))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:huggingface_hub")
def test_log_likelihoods_behind_a_prompt_that_ends_are_pefts_item_by_item(place, base, prompts, tmp_path):
    items = contexts(base)
    body = lm_eval_request("ends", [list(context + answer) for context, answer in items])
    answer = place.post("/v1/completions", body).json()
    lengths = [len(context) for context, _ in items]
    found = lm_eval_log_likelihoods(answer, lengths)
    expected = pefts_log_likelihoods(prompts["ends"], base, tmp_path / "ends")
    assert found == pytest.approx(expected, abs=TIGHT)
    ends = [choice["logprobs"]["tokens"][-1] for choice in answer["choices"]]
    assert ends.count("</s>") >= len(QUESTIONS), "the prompt has not learned to end: nothing is tested"
    # the controls: another prompt, and the list without the token that ended the answer
    other = pefts_log_likelihoods(prompts["other"], base, tmp_path / "other")
    assert min(abs(a - b) for a, b in zip(found, other, strict=True)) > LOOSE
    for choice in answer["choices"]:
        if choice["logprobs"]["tokens"][-1] == "</s>":
            choice["logprobs"]["token_logprobs"].pop()
    assert lm_eval_log_likelihoods(answer, lengths) != pytest.approx(expected, abs=LOOSE)


def test_the_token_that_ends_an_answer_is_reported_and_counted(place, base):
    asked, answered = QUESTIONS[0]
    body = {"model": "ends", "prompt": words(asked), "max_tokens": 9, "temperature": 0, "logprobs": 1}
    answer = place.post("/v1/completions", body).json()
    (choice,) = answer["choices"]
    assert choice["text"].split() == words(answered).split() and choice["finish_reason"] == "stop"
    report = choice["logprobs"]
    assert [token.strip() for token in report["tokens"]] == [*words(answered).split(), "</s>"]
    assert len(report["token_logprobs"]) == len(report["top_logprobs"]) == 4
    assert report["text_offset"][-1] == len(choice["text"])
    assert answer["usage"]["completion_tokens"] == 4

    streamed = events_of(place.post("/v1/completions", body | {"stream": True}).text)[:-1]
    reports = [event["choices"][0]["logprobs"] for event in streamed]
    for key in report:
        assert [each for one in reports if one for each in one[key]] == report[key]
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]


@pytest.mark.parametrize("stops_at", ["the base's end", "a stop id", "a stop string"])
def test_the_last_token_of_a_chat_is_in_its_log_probabilities(place, stops_at):
    more = {"a stop id": {"stop_token_ids": [60]}, "a stop string": {"stop": "w60"}}.get(stops_at, {})
    last = {"the base's end": "</s>"}.get(stops_at, "w60")
    asked = {"role": "user", "content": words(QUESTIONS[0][0])}
    body = {"model": "ends", "messages": [asked], "temperature": 0, "logprobs": True, "max_tokens": 9} | more
    answer = place.post("/v1/chat/completions", body).json()
    (choice,) = answer["choices"]
    tokens = [each["token"].strip() for each in choice["logprobs"]["content"]]
    assert tokens[-1] == last and last not in choice["message"]["content"]
    assert answer["usage"]["completion_tokens"] == len(tokens)
    streamed = events_of(place.post("/v1/chat/completions", body | {"stream": True}).text)[:-1]
    reports = [event["choices"][0]["logprobs"] for event in streamed]
    assert [each for one in reports if one for each in one["content"]] == choice["logprobs"]["content"]


def test_the_metrics_count_what_usage_counts(place):
    def generated() -> float:
        lines = place.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("softprompt:generation_tokens_total{"))

    before = generated()
    body = {"model": "ends", "prompt": words(QUESTIONS[0][0]), "max_tokens": 9, "temperature": 0}
    usage = place.post("/v1/completions", body).json()["usage"]
    assert usage["completion_tokens"] == 4 == generated() - before


@pytest.mark.parametrize("asks", ["a long text", "a long answer", "token ids"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_context_that_is_too_long_is_refused_in_openais_words(place, path, asks):
    """By this beginning litellm knows a ContextWindowExceededError and calls the model that it falls back to."""
    text = "w3 " * 100 if asks == "a long text" else "w3"
    given = {"prompt": [3] * 200 if asks == "token ids" else text}
    if "chat" in path:
        given = {"messages": [{"role": "user", "content": text}]}
    most = 9 if asks == "a long text" else 500
    answer = place.post(path, {"model": "ends", "max_tokens": most, **given})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 96 tokens. However, you ")
    if asks == "a long answer":
        num_ids = 2
        assert (
            f"requested {8 + num_ids + 500} tokens ({num_ids} in the text, 8 in the soft prompt, 500 in the"
            in (error["message"])
        )


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOL_TURNS = [
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "w4", "tool_call_id": "call_1"},
    {"role": "user", "content": words(QUESTIONS[0][0])},
]
WRITES_TOOLS = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% for call in m.tool_calls or [] %}{{ call.function.name }} "
    "{% endfor %}{% endfor %}"
)
LEAVES_TOOLS_OUT = "{% for m in messages if m.role != 'tool' %}{{ m.role }} {{ m.content }} {% endfor %}"


def test_turns_of_tools_are_taken_by_a_prompt_that_reads_the_last_user_message(place):
    """With the tools themselves, which `tool_choice` "none" leaves unused."""
    asked = {"model": "ends", "messages": TOOL_TURNS, "temperature": 0, "max_tokens": 9, "tools": [WEATHER],
             "tool_choice": "none", "parallel_tool_calls": False}  # fmt: skip
    answer = place.post("/v1/chat/completions", asked).json()
    assert answer["choices"][0]["message"]["content"].split() == words(QUESTIONS[0][1]).split()
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("template", "refused"),
    [(WRITES_TOOLS, None), (LEAVES_TOOLS_OUT, "messages of the role 'tool'"),
     (WRITES_TOOLS.replace("m.tool_calls or []", "[]"), "tool_calls")],
)  # fmt: skip
def test_turns_of_tools_are_read_where_the_chat_template_writes_them_and_else_refused(
    base, template, refused, monkeypatch
):
    monkeypatch.setattr(base.tokenizer, "chat_template", template)
    messages = [{**turn, "content": turn["content"] or ""} for turn in TOOL_TURNS]
    if refused is None:
        assert len(conversation_ids(base, None, messages)) > 8
        return
    with pytest.raises(ApiError, match=f"{refused} cannot be read: the base's chat template leaves them out"):
        conversation_ids(base, None, messages)
    assert conversation_ids(base, None, messages[:1])


def test_values_that_mean_nothing_to_openai_mean_nothing_here(place):
    plain = {"model": "ends", "prompt": words(QUESTIONS[0][0]), "max_tokens": 5, "seed": 5}
    expected = place.post("/v1/completions", plain).json()["choices"]
    for nothing in ({"stop": ""}, {"stop": []}, {"logprobs": False}, {"suffix": ""}, {"logit_bias": {}}):
        assert place.post("/v1/completions", plain | nothing).json()["choices"] == expected, nothing
    turns = {"messages": [{"role": "user", "content": plain["prompt"]}]}
    for nothing in ({"logprobs": False}, {"logprobs": 0}, {"stop": ""}, {"tools": []}):
        answer = place.post("/v1/chat/completions", {"model": "ends", "max_tokens": 5, **turns, **nothing}).json()
        assert answer["choices"][0]["logprobs"] is None, nothing


def test_a_negative_seed_is_a_seed(place):
    def ask(seed: int) -> str:
        body = {"model": "other", "prompt": "w3", "max_tokens": 20, "seed": seed, "ignore_eos": True}
        text: str = place.post("/v1/completions", body).json()["choices"][0]["text"]
        return text

    assert ask(-1) == ask(-1) != ask(-2)
    assert ask(-(2**63)) and ask(2**63 - 1)


def test_usage_tells_what_came_from_the_prefix_cache(place):
    """A text's keys and values are kept when it is asked for again, in blocks of 16 tokens."""
    body = {"model": "other", "prompt": words(tuple(range(30, 70))), "max_tokens": 1}
    found = [place.post("/v1/completions", body).json()["usage"] for _ in range(3)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in found] == [0, 0, 32]
    assert {usage["prompt_tokens"] for usage in found} == {41}
    streamed = events_of(place.post("/v1/completions", body | {"stream": True, "stream_options": {
        "include_usage": True}}).text)  # fmt: skip
    assert streamed[-2]["usage"] == found[-1]


def test_the_fingerprint_is_of_base_and_prompt(place, base, prompts):
    def fingerprint(model: str, path: str = "/v1/completions", **more: Any) -> str:
        answer = place.post(path, {"model": model, "prompt": "w3", "max_tokens": 1, **more})
        found = events_of(answer.text)[0] if more.get("stream") else answer.json()
        return str(found["system_fingerprint"])

    assert fingerprint("ends").startswith("fp_") and fingerprint("ends") == fingerprint("ends", stream=True)
    assert len({fingerprint(model) for model in ("base", "ends", "other")}) == 3
    chat = {"messages": [{"role": "user", "content": "w3"}]}
    assert fingerprint("ends", "/v1/chat/completions", **chat) == fingerprint("ends")
    dependency_of(place.app, PromptRegistry).publish(Model(id="again", prompt=prompts["ends"]))
    assert fingerprint("again") == fingerprint("ends")


@pytest.mark.skipif(native_library() is None, reason="the C library was not compiled")
def test_a_server_with_int8_weights_says_so_in_its_fingerprint(tmp_path):
    wide = build_base(hidden_size=64, intermediate_size=96)
    body = {"model": "base", "prompt": "w3", "max_tokens": 3, "logprobs": 0, "ignore_eos": True}
    found = {}
    for weights in ("loaded", "int8"):
        with app_server(wide, tmp_path / weights, {}, EngineConfig(weights=weights)) as server:
            found[weights] = server.post("/v1/completions", body).json()
    assert found["int8"]["system_fingerprint"] == f"{found['loaded']['system_fingerprint']}_int8"
    log_probs = [found[weights]["choices"][0]["logprobs"]["token_logprobs"] for weights in found]
    assert log_probs[0] != log_probs[1]


def test_the_root_says_what_this_is_and_the_version_is_as_vllm_has_it(place):
    index = place.http.get("/").json()
    assert index["name"] == "softprompt" and index["version"] == version("softprompt")
    assert {place.http.get(link).status_code for link in index["links"].values()} == {200}
    assert place.http.get("/version").json() == {"version": version("softprompt")}


USER = [{"role": "user", "content": "w3 w4"}]
BODIES = {  # as seen on the wire, the number of tokens apart
    "lm_eval, an answer": ("completions", {"prompt": [[1, 5, 6]], "max_tokens": 9, "temperature": 0,
                                           "stop": ["\n\n", "</s>"], "seed": 1234}),
    "promptfoo, completion": ("completions", {"prompt": "w3", "max_tokens": 9, "temperature": 0, "top_p": 1,
                                              "presence_penalty": 0, "frequency_penalty": 0, "best_of": 1,
                                              "stop": ["<|im_end|>", "<|endoftext|>"]}),
    "promptfoo, chat": ("chat/completions", {"messages": USER, "max_tokens": 9, "temperature": 0}),
    "litellm, chat": ("chat/completions", {"messages": USER, "stop": "", "max_tokens": 3}),
    "openai for Node": ("chat/completions", {"messages": USER, "max_completion_tokens": 5, "stream": True,
                                             "stream_options": {"include_usage": True}}),
}  # fmt: skip


@pytest.mark.parametrize("client", BODIES)
def test_a_clients_body_is_answered(place, client):
    path, body = BODIES[client]
    answer = place.post(f"/v1/{path}", {"model": "ends", **body})
    assert answer.status_code == 200, answer.text
    last = events_of(answer.text)[-2] if body.get("stream") else answer.json()
    assert 1 <= last["usage"]["completion_tokens"] <= 9
