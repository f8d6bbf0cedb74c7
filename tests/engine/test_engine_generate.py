"""How answers end, what they report, who is refused, and that a batch's members do not touch each other."""

from dataclasses import replace

import pytest
import torch
from support.engine_runs import kv_bytes
from support.slow_truth import plain_greedy
from support.tiny_bases import EOS, LIMIT, build_base, build_model, build_tokenizer, random_ids, random_prompt

from softprompt.base import freeze_base
from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import AsyncEngine, Engine, Finished, Request, generate
from softprompt.errors import BaseModelError, ConfigError, DataError, LengthError, MemoryLimitError, PromptError
from softprompt.families import forward_of
from softprompt.loss import target_nlls
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row


def greedy(base, request, **settings):
    return generate(base, [request], SamplingConfig(**{"max_new_tokens": 12, **settings}))[0]


def stopping_base(stop_id):
    """The tiny Llama, told that one more id ends an answer."""
    model = build_model("llama")
    model.generation_config.eos_token_id = [EOS, stop_id]
    return freeze_base(model, build_tokenizer())


def test_every_stop_id_ends_an_answer_and_is_left_out(tiny_llama):
    request = Request(random_ids(4))
    free = greedy(tiny_llama, request)
    assert (free.finish_reason, len(free.ids)) == ("length", 12)
    position = next(i for i, token in enumerate(free.ids) if i >= 3 and token not in free.ids[:i])
    stopped = greedy(stopping_base(free.ids[position]), request)
    assert (stopped.finish_reason, stopped.ids) == ("stop", free.ids[:position])


def test_min_new_tokens_forbids_the_end_until_then(tiny_llama):
    request = Request(random_ids(4))
    free = greedy(tiny_llama, request)
    base = stopping_base(free.ids[2])
    position = free.ids.index(free.ids[2])
    assert len(greedy(base, request).ids) == position
    assert len(greedy(base, request, min_new_tokens=position).ids) == position
    longer = greedy(base, request, min_new_tokens=position + 2)
    assert longer.ids[:position] == free.ids[:position]
    assert len(longer.ids) >= position + 2
    assert free.ids[2] not in longer.ids[: position + 2]


def test_a_stop_string_ends_the_text_before_itself(tiny_llama):
    request = Request(random_ids(4))
    free = greedy(tiny_llama, request)
    words = free.text.split()
    position = next(i for i, word in enumerate(words) if i >= 3 and word not in words[:i])
    stopped = greedy(tiny_llama, request, stop=(words[position], "never said"))
    assert stopped.finish_reason == "stop"
    assert stopped.text.split() == words[:position]
    assert stopped.ids == free.ids[: position + 1]


def test_rows_that_end_leave_the_batch_and_the_others_answer_as_before(tiny_llama):
    requests = [Request(random_ids(3 + 4 * seed, seed)) for seed in range(4)]
    free = [greedy(tiny_llama, request) for request in requests]
    base = stopping_base(free[2].ids[1])
    engine, num_rows, ends = Engine(base), [], {}
    for request in requests:
        engine.add(replace(request, sampling=SamplingConfig(max_new_tokens=12)))
    while engine.has_work:
        ends.update((event.request, event) for event in engine.step() if isinstance(event, Finished))
        num_rows.append(engine.stats().num_running)
    assert [ends[number].answers[0].ids for number in range(4)] == [greedy(base, request).ids for request in requests]
    assert 4 > num_rows[0] > num_rows[-2] > num_rows[-1] == 0  # two end at once
    assert num_rows == sorted(num_rows, reverse=True)


def test_log_probs_are_the_trainers(tiny_llama):
    prompt = SoftPrompt(random_prompt(tiny_llama, 5))
    request = Request(random_ids(4), prompt)
    answer = greedy(tiny_llama, request)
    mask = (False,) * 4 + (True,) * len(answer.ids)
    (nats,) = target_nlls(tiny_llama, forward_of(tiny_llama), [Row(request.ids + answer.ids, 0, mask)], [prompt.tensor])
    assert [-value for value in nats.values()] == pytest.approx(answer.log_probs, abs=1e-5)


def test_two_prompts_switched_on_one_base_give_what_each_gives_alone(tiny_llama):
    first, second = (Request(random_ids(5), SoftPrompt(random_prompt(tiny_llama, 4, seed))) for seed in (1, 2))
    alone = [greedy(build_base("llama"), request).ids for request in (first, second)]
    switched = [greedy(tiny_llama, request).ids for request in (first, second, first, second)]
    assert switched == alone * 2
    assert alone[0] != alone[1]


def test_the_prompts_alone_can_be_continued(tiny_llama):
    prompt = SoftPrompt(random_prompt(tiny_llama, 4))
    true_ids, _, _ = plain_greedy(tiny_llama, (), prompt.tensor, 12)
    assert list(greedy(tiny_llama, Request((), prompt)).ids) == [i for i in true_ids if i != EOS]


def test_generate_of_no_requests_gives_no_answers(tiny_llama):
    assert generate(tiny_llama, []) == []


def test_a_request_longer_than_the_context_is_refused_with_its_numbers(tiny_llama):
    prompt = SoftPrompt(random_prompt(tiny_llama, 10))
    greedy(tiny_llama, Request(random_ids(LIMIT - 22), prompt))
    with pytest.raises(
        LengthError,
        match=rf"maximum context length is {LIMIT} .* requested {LIMIT + 1} tokens "
        rf"\({LIMIT - 21} in the text, 10 in the soft prompt, 12 in the completion\)",
    ):
        greedy(tiny_llama, Request(random_ids(LIMIT - 21), prompt))


WIDE = SoftPrompt(torch.ones(2, 7))
REFUSED = [  # request, error, its message and the field of OpenAI's API that it names
    (Request((5,), WIDE), PromptError, "has width 7; base 'tiny-llama' takes 16", "model"),
    (Request(()), DataError, "empty text", "prompt"),
    (Request((5, 10**30)), DataError, "the text has token id 10{30}; those of base 'tiny-llama' are 0 to", "prompt"),
    (Request((5,), num_choices=0), ConfigError, "num_choices is 0; it must be between 1 and 128", "n"),
    (Request((5,), num_log_probs=10**6), ConfigError, "num_log_probs is 1000000", "logprobs"),
    (Request((5,), num_text_log_probs=-1), ConfigError, "num_text_log_probs is -1", "logprobs"),
    (Request((5,), sampling=SamplingConfig(logit_bias=((10**6, 1.0),))), DataError, "logit_bias has", "logit_bias"),
    (Request((5,), sampling=SamplingConfig(logit_bias=((-1, 1.0),))), DataError, "token id -1", "logit_bias"),
    (Request((5,), sampling=SamplingConfig(stop_ids=(10**6,))), DataError, "stop_ids has", "stop_token_ids"),
    (Request((5,), sampling=SamplingConfig(max_new_tokens=10**18)), LengthError, r"more than 10\^18 in", "max_tokens"),
]


@pytest.mark.parametrize(("request_", "kind", "message", "param"), REFUSED)
def test_a_request_that_the_base_cannot_answer_is_refused_with_the_field_that_is_wrong(
    tiny_llama, request_, kind, message, param
):
    engine = Engine(tiny_llama)
    for judge in (engine.check, AsyncEngine(engine).check, engine.add):
        with pytest.raises(kind, match=message) as caught:
            judge(request_)
        assert caught.value.param == param
    assert not engine.has_work


def test_a_request_longer_than_the_memory_is_refused_before_it_is_added(tiny_llama):
    engine = Engine(tiny_llama, EngineConfig(kv_bytes=kv_bytes(tiny_llama, 64)))
    engine.check(Request((5,), sampling=SamplingConfig(max_new_tokens=63)))
    with pytest.raises(MemoryLimitError, match="65 positions are more than the engine's memory") as caught:
        engine.check(Request((5,), sampling=SamplingConfig(max_new_tokens=64)))
    assert caught.value.param == "max_tokens"


def test_a_base_that_computes_nan_is_an_error_and_no_answer():
    model = build_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(BaseModelError, match="computes NaN"):
        greedy(freeze_base(model, build_tokenizer()), Request((5, 6)))


def test_bfloat16_answers_are_the_float32_ones_up_to_near_ties():
    half, whole = build_base("llama", dtype=torch.bfloat16), build_base("llama")
    for seed in range(5):
        request = Request(random_ids(6, seed), SoftPrompt(random_prompt(whole, 4, seed)))
        answer = greedy(half, request)
        true_ids, true_log_probs, _ = plain_greedy(whole, request.ids, request.prompt.tensor, 12)
        for step, (ours, theirs) in enumerate(zip(answer.ids, true_ids, strict=False)):
            assert answer.log_probs[step] == pytest.approx(float(true_log_probs[step][ours]), abs=0.2)
            assert ours in true_log_probs[step].topk(3).indices
            if ours != theirs:
                break


def test_the_real_story_teller_goes_on_as_it_should(stories):
    request = Request(stories.bos_ids + stories.encode("Once upon a time"))
    (answer,) = generate(stories, [request], SamplingConfig(max_new_tokens=60))
    assert answer.text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )


def test_the_real_story_ends_by_its_end_token(stories):
    request = Request(stories.bos_ids + stories.encode("Once upon a time"))
    (answer,) = generate(stories, [request], SamplingConfig(max_new_tokens=400))
    assert answer.finish_reason == "stop"
    assert not set(answer.ids) & set(stories.stop_ids)
