"""Sampling is transformers' own processors in its own order, and a row's draw does not know its neighbours."""

import pytest
import torch
from support.slow_truth import plain_logits
from support.tiny_bases import EOS, random_ids, random_prompt
from transformers import GenerationConfig

from softprompt.config import SamplingConfig
from softprompt.engine import Request, generate
from softprompt.engine.sampler import uniform
from softprompt.prompt import SoftPrompt

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.7},
    {"temperature": 1.0, "min_new_tokens": 8, "repetition_penalty": 0.5},
]


def request_of(base, seed=0, length=5):
    return Request(random_ids(length, seed), SoftPrompt(random_prompt(base, 3 + seed, seed)))


@torch.no_grad()
def slow_sample(base, request, config):
    """Full forwards, transformers' processors as its `generate` would line them up, fed the real ids."""
    settings = GenerationConfig(
        do_sample=config.temperature > 0, temperature=config.temperature or 1.0, top_k=config.top_k, top_p=config.top_p,
        min_p=config.min_p or None, repetition_penalty=config.repetition_penalty,
        min_new_tokens=config.min_new_tokens or None, eos_token_id=list(base.stop_ids),
    )  # fmt: skip
    settings._eos_token_tensor = torch.tensor(base.stop_ids)
    processors = base.model._get_logits_processor(settings, input_ids_seq_length=len(request.ids), device="cpu")
    own = list(request.ids)
    for step in range(config.max_new_tokens):
        logits = plain_logits(base, own, request.prompt.tensor)[-1:].float()
        scores = processors(torch.tensor([own]), logits)[0]
        mass = torch.softmax(scores.double(), dim=-1).cumsum(0)
        own.append(int(torch.searchsorted(mass, uniform(config.seed, step) * mass[-1], right=True)))
        if own[-1] in base.stop_ids:
            own.pop()
            break
    return tuple(own[len(request.ids) :])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_those_that_transformers_processors_allow(tiny_llama, settings):
    for seed in range(3):
        config = SamplingConfig(max_new_tokens=15, seed=seed, **settings)
        request = request_of(tiny_llama, seed)
        assert generate(tiny_llama, [request], config)[0].ids == slow_sample(tiny_llama, request, config)


def test_the_order_of_the_processors_matters_to_the_test_above(tiny_llama):
    """The control: another temperature, another order of draws, another answer."""
    request = request_of(tiny_llama)
    config = SamplingConfig(max_new_tokens=15, temperature=1.4, top_p=0.8)
    other = SamplingConfig(max_new_tokens=15, temperature=1.0, top_p=0.8)
    assert generate(tiny_llama, [request], config)[0].ids != slow_sample(tiny_llama, request, other)


def test_a_seed_gives_the_same_answer_in_any_company(tiny_llama):
    config = SamplingConfig(max_new_tokens=20, temperature=1.5, seed=3)
    mine, others = request_of(tiny_llama, 1), [request_of(tiny_llama, seed, 2 + 5 * seed) for seed in (0, 2, 4)]
    (alone,) = generate(tiny_llama, [mine], config)
    assert generate(tiny_llama, [*others, mine], config)[3].ids == alone.ids
    assert generate(tiny_llama, [mine, *others], config)[0].ids == alone.ids


def test_another_seed_is_another_answer_and_the_same_seed_the_same(tiny_llama):
    request = request_of(tiny_llama)
    answers = [
        generate(tiny_llama, [request], SamplingConfig(max_new_tokens=20, temperature=1.5, seed=seed))[0].ids
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_sampling_leaves_torchs_own_generator_alone(tiny_llama):
    before = torch.random.get_rng_state()
    generate(tiny_llama, [request_of(tiny_llama)], SamplingConfig(temperature=1.0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_k_of_one_is_greedy(tiny_llama):
    request = request_of(tiny_llama)
    greedy, narrow = (
        generate(tiny_llama, [request], SamplingConfig(max_new_tokens=20, **settings))[0]
        for settings in ({}, {"temperature": 5.0, "top_k": 1})
    )
    assert greedy.ids == narrow.ids


def test_log_probs_are_raw_whatever_the_settings(tiny_llama):
    request = request_of(tiny_llama)
    config = SamplingConfig(max_new_tokens=6, min_new_tokens=6, temperature=3.0, top_k=7, repetition_penalty=2.0)
    (answer,) = generate(tiny_llama, [request], config)
    with torch.no_grad():
        logits = plain_logits(tiny_llama, (*request.ids, *answer.ids), request.prompt.tensor)
    raw = torch.log_softmax(logits, dim=-1)[-7:-1].gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    assert answer.log_probs == pytest.approx(raw.tolist(), abs=1e-5)
    assert EOS not in answer.ids
