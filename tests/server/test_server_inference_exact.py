"""Answers over HTTP are the engine's, and plain concatenation's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.app_server import AppServer, app_server, words
from support.engine_runs import answers
from support.slow_truth import assert_same_answer, plain_greedy, plain_logits
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.data import DEFAULT_CHAT_TEMPLATE, chat_prompt_ids
from softprompt.engine import Request
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord

LENGTHS = {"p1": 1, "p4": 4, "p9": 9}
MANY = 64


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base()


@pytest.fixture(scope="module")
def prompts(base: Base) -> dict[str, SoftPrompt]:
    found = {name: SoftPrompt(random_prompt(base, length, length)) for name, length in LENGTHS.items()}
    forms = {
        "chat": InputForm(kind="chat"),
        "template": InputForm(kind="template", template="w50 {text} w51"),
        "two-fields": InputForm(kind="template", template="{a} {b}"),
    }
    for number, (name, form) in enumerate(forms.items()):
        found[name] = SoftPrompt(random_prompt(base, 3, 100 + number), PromptRecord(form=form))
    for number in range(MANY):
        found[f"many-{number}"] = SoftPrompt(random_prompt(base, 1 + number % 5, 200 + number))
    return found


@pytest.fixture(scope="module")
def server(base: Base, prompts: dict[str, SoftPrompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    with app_server(base, tmp_path_factory.mktemp("state"), prompts) as server:
        yield server


def truth(base, ids, prompt, num_new=12):
    return plain_greedy(base, ids, None if prompt is None else prompt.tensor, num_new)


def token_ids(base: Base, tokens: list[str]) -> list[int]:
    return [base.tokenizer.convert_tokens_to_ids(token.strip()) for token in tokens]


@pytest.mark.parametrize("name", ["base", *LENGTHS])
def test_a_greedy_completion_is_plain_concatenations(server, base, prompts, name):
    ids = random_ids(7, seed=len(name))
    answer = server.client.completions.create(
        model=name, prompt=words(ids), max_tokens=12, temperature=0, logprobs=0
    ).choices[0]
    found = token_ids(base, answer.logprobs.tokens)
    whole = base.bos_ids + ids
    assert_same_answer(found, answer.logprobs.token_logprobs, truth(base, whole, prompts.get(name)), base.stop_ids)
    if name != "base":  # the controls: no prompt, and another one
        for wrong in (None, prompts["chat"]):
            wrong_truth = truth(base, whole, wrong)
            with pytest.raises(AssertionError):
                assert_same_answer(found, answer.logprobs.token_logprobs, wrong_truth, base.stop_ids)


@pytest.mark.parametrize("name", ["base", *LENGTHS])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_log_probabilities_of_an_echoed_text_are_plain_concatenations(server, base, prompts, name, max_tokens):
    """As lm-eval-harness asks for them."""
    ids = base.bos_ids + random_ids(19, seed=len(name))
    found = server.client.completions.create(
        model=name, prompt=list(ids), max_tokens=max_tokens, temperature=0, logprobs=1, echo=True, seed=1,
        extra_body={"ignore_eos": True},
    ).choices[0].logprobs  # fmt: skip
    answered = token_ids(base, found.tokens[len(ids) :])
    assert token_ids(base, found.tokens[: len(ids)]) == list(ids) and len(answered) == max_tokens

    def truth_of(prompt):
        tensor = None if prompt is None else prompt.tensor
        with torch.no_grad():
            logits = plain_logits(base, (*ids, *answered), tensor)
        rows = torch.log_softmax(logits, dim=-1)[0 if prompt is None else len(tensor) - 1 : -1]
        whole = (*ids, *answered)[1 if prompt is None else 0 :]
        return [float(row[token]) for row, token in zip(rows, whole, strict=True)], rows.amax(dim=-1).tolist()

    (first, *rest), (first_top, *rest_tops) = found.token_logprobs, found.top_logprobs
    assert (first is None) == (first_top is None) == (name == "base")
    values = rest if first is None else [first, *rest]
    tops = rest_tops if first is None else [first_top, *rest_tops]
    true_values, true_best = truth_of(prompts.get(name))
    assert values == pytest.approx(true_values, abs=1e-5)
    assert [max(top.values()) for top in tops] == pytest.approx(true_best, abs=1e-5)
    if name != "base":  # the control
        wrong, _ = truth_of(prompts["chat"])
        assert min(abs(ours - theirs) for ours, theirs in zip(values[:3], wrong, strict=False)) > 1e-5


def test_sampled_choices_of_several_texts_equal_the_engines(server, base, prompts):
    texts = [random_ids(5, seed=seed) for seed in range(3)]
    sampling = SamplingConfig(
        max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=0.1, seed=5, logit_bias=((7, 2.0),), stop=("w9 w",),
        stop_ids=(11,), ignore_eos=True, min_new_tokens=2,
    )  # fmt: skip
    answer = server.client.completions.create(
        model="p4", prompt=[list(base.bos_ids + ids) for ids in texts], n=3, max_tokens=9, temperature=0.8, top_p=0.9,
        presence_penalty=0.3, frequency_penalty=0.1, seed=5, logit_bias={"7": 2}, stop="w9 w",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "stop_token_ids": [11], "ignore_eos": True,
                    "min_tokens": 2},
    )  # fmt: skip
    expected = [
        answers(base, [Request(base.bos_ids + ids, prompts["p4"], SamplingConfig(**{**vars(sampling), "seed": 5 + i}))])
        for ids in texts
        for i in range(3)
    ]
    assert [choice.index for choice in answer.choices] == list(range(9))
    assert [choice.text for choice in answer.choices] == [one.text for (one,) in expected]
    assert [choice.finish_reason for choice in answer.choices] == [one.finish_reason for (one,) in expected]
    assert answer.usage.completion_tokens == sum(one.num_generated for (one,) in expected)
    assert answer.usage.prompt_tokens == 3 * 6
    assert answer.usage.prompt_tokens_details.virtual_tokens == 3 * 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len({choice.text for choice in answer.choices}) > 3


def test_requests_sample_anew_without_a_seed_and_alike_with_one(server):
    def ask(**settings):
        return server.client.completions.create(
            model="p1", prompt="w3", max_tokens=20, extra_body={"ignore_eos": True}, **settings
        ).choices[0].text  # fmt: skip

    assert len({ask() for _ in range(3)}) == 3
    alike = server.client.completions.create(model="p1", prompt=["w3"] * 3, extra_body={"ignore_eos": True})
    assert len({choice.text for choice in alike.choices}) == 3
    assert ask(seed=0) == ask(seed=0) != ask(seed=1)


@pytest.mark.medium
def test_sixty_four_clients_with_sixty_four_prompts_each_get_their_own(server, base, prompts):
    texts = [random_ids(3 + number % 4, seed=number) for number in range(MANY)]

    async def ask(client, number):
        answer = await client.completions.create(
            model=f"many-{number}", prompt=words(texts[number]), max_tokens=8, temperature=0, logprobs=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return answer.choices[0].logprobs

    async def ask_all():
        clients = [server.async_client() for _ in range(MANY)]
        try:
            return await asyncio.gather(*(ask(client, number) for number, client in enumerate(clients)))
        finally:
            for client in clients:
                await client.close()

    found = asyncio.run(ask_all())
    sampling = SamplingConfig(max_new_tokens=8, ignore_eos=True)
    expected = answers(
        base,
        [Request(base.bos_ids + ids, prompts[f"many-{number}"], sampling, num_log_probs=0)
         for number, ids in enumerate(texts)],
    )  # fmt: skip
    for number in range(MANY):
        assert token_ids(base, found[number].tokens) == list(expected[number].ids)
        assert found[number].token_logprobs == pytest.approx(expected[number].log_probs, abs=1e-5)
    # the control: the neighbour's prompt would have shown
    wrong = [found[number].token_logprobs[0] - expected[(number + 1) % MANY].log_probs[0] for number in range(MANY)]
    assert min(map(abs, wrong)) > 1e-4


def before_the_end(base: Base, content: list[Any]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of a chat's report, without the end of text that it may close with."""
    ids = token_ids(base, [token.token for token in content])
    num = len(ids) - (ids[-1] in base.stop_ids)
    return ids[:num], [token.logprob for token in content[:num]]


def chat(server: AppServer, model: str, messages: list[dict[str, object]], **settings: object):
    return server.client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, logprobs=True, **settings
    )


@pytest.mark.parametrize("name", ["base", "chat"])
def test_chat_goes_through_the_default_template_where_the_tokenizer_has_none(server, base, prompts, name):
    messages = [
        {"role": "system", "content": "w5"},
        {"role": "user", "content": [{"type": "text", "text": "w6"}, {"type": "text", "text": "w7"}]},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": "w9 w10"},
    ]
    plain = [{**message, "content": "w6\nw7"} if message["content"] == messages[1]["content"] else message
             for message in messages]  # fmt: skip
    assert not base.tokenizer.chat_template and "Assistant:" in DEFAULT_CHAT_TEMPLATE
    ids = chat_prompt_ids(base, plain)
    answer = chat(server, name, messages)
    found = answer.choices[0].logprobs.content
    assert answer.usage.prompt_tokens == len(ids)
    assert_same_answer(*before_the_end(base, found), truth(base, ids, prompts.get(name), 8), base.stop_ids)


@pytest.mark.parametrize(("name", "text"), [("p4", "w9 w10"), ("template", "w50 w9 w10 w51")])
def test_a_prompt_that_was_not_trained_on_chat_reads_the_last_user_message(server, base, prompts, name, text):
    messages = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"},
                {"role": "user", "content": "w9 w10"}]  # fmt: skip
    answer = chat(server, name, messages)
    found = answer.choices[0].logprobs.content
    ids = base.bos_ids + base.encode(text)
    assert answer.usage.prompt_tokens == len(ids)
    assert_same_answer(*before_the_end(base, found), truth(base, ids, prompts[name], 8), base.stop_ids)
    whole = truth(base, chat_prompt_ids(base, messages), prompts[name], 8)
    with pytest.raises(AssertionError):
        assert_same_answer(*before_the_end(base, found), whole, base.stop_ids)


def test_a_chat_answer_may_use_all_positions_that_are_left(server, base):
    answer = server.client.chat.completions.create(
        model="p4", messages=[{"role": "user", "content": "w9 w10"}], extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == base.max_length - 4 - 3
    assert answer.usage.prompt_tokens_details.virtual_tokens == 4


def test_the_base_is_bit_identical_after_serving(server, base):
    fresh = build_base()
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, fresh.model.get_parameter(name)), name
