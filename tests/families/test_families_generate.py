"""Answers of mixed prompts in one batch are those of each alone, of transformers' `generate` and of a slow loop."""

import pytest
import torch
from support.family_configs import each_of
from support.slow_truth import assert_same_answer, plain_greedy
from support.tiny_bases import FAMILIES, LIMIT, OTHERS, build_base, random_ids, random_prompt

from softprompt.config import SamplingConfig
from softprompt.engine import Request, generate
from softprompt.prompt import SoftPrompt

NUM_NEW = 12


def mixed_requests(base):
    first, second = SoftPrompt(random_prompt(base, 3, seed=3)), SoftPrompt(random_prompt(base, 9, seed=9))
    return [
        Request(random_ids(4, 1), first),
        Request(random_ids(11, 2), second),
        Request(random_ids(6, 3), None),
        Request(random_ids(1, 4), first),
        Request(random_ids(2, 5), second),
    ]


def tensor_of(request):
    return None if request.prompt is None else request.prompt.tensor


def transformers_answer(base, request, penalty=1.0):
    text = base.embed(torch.tensor(request.ids))
    whole = text if request.prompt is None else torch.cat([request.prompt.tensor, text])
    out = base.model.generate(
        inputs_embeds=whole[None], attention_mask=torch.ones(1, len(whole), dtype=torch.long),
        max_new_tokens=NUM_NEW, do_sample=False, repetition_penalty=penalty,
    )  # fmt: skip
    return [token for token in out[0].tolist() if token not in base.stop_ids]


@pytest.mark.parametrize("family", each_of([*FAMILIES, *OTHERS]))
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_mixed_prompts_in_one_batch_equal_the_slow_loop_and_each_alone(family, penalty):
    base = build_base(family)
    sampling = SamplingConfig(max_new_tokens=NUM_NEW, repetition_penalty=penalty)
    requests = mixed_requests(base)
    together = generate(base, requests, sampling)
    for request, answer in zip(requests, together, strict=True):
        truth = plain_greedy(base, request.ids, tensor_of(request), NUM_NEW, penalty)
        assert_same_answer(answer.ids, answer.log_probs, truth, base.stop_ids)
        (alone,) = generate(base, [request], sampling)
        assert_same_answer(alone.ids, alone.log_probs, truth, base.stop_ids)


@pytest.mark.parametrize("family", each_of(FAMILIES))
def test_greedy_answers_equal_transformers_generate_on_concatenated_embeddings(family):
    base = build_base(family)
    requests = mixed_requests(base)
    for request, answer in zip(requests, generate(base, requests, SamplingConfig(max_new_tokens=NUM_NEW)), strict=True):
        assert list(answer.ids) == transformers_answer(base, request)


@pytest.mark.parametrize("family", each_of(FAMILIES))
def test_an_answer_may_use_every_position_of_the_base(family):
    base = build_base(family)
    request = Request(random_ids(20, 1), SoftPrompt(random_prompt(base, 64)))
    sampling = SamplingConfig(max_new_tokens=LIMIT - 84, min_new_tokens=LIMIT - 84)
    (answer,) = generate(base, [request], sampling)
    assert len(answer.ids) == LIMIT - 84


def test_answers_of_a_wrong_a_shuffled_and_no_prompt_differ(tiny_llama):
    ids, right = random_ids(4, 1), random_prompt(tiny_llama, 5, seed=1)
    prompts = [right, random_prompt(tiny_llama, 5, seed=2), right.flip(0)]
    requests = [Request(ids, SoftPrompt(prompt)) for prompt in prompts] + [Request(ids)]
    own, *wrong = generate(tiny_llama, requests, SamplingConfig(max_new_tokens=NUM_NEW))
    truth = plain_greedy(tiny_llama, ids, right, NUM_NEW)
    assert_same_answer(own.ids, own.log_probs, truth, tiny_llama.stop_ids)
    for answer in wrong:
        with pytest.raises(AssertionError):
            assert_same_answer(answer.ids, answer.log_probs, truth, tiny_llama.stop_ids)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
def test_transformers_penalty_on_embeddings_misses_the_ids_of_the_text(tiny_llama):
    """Why the reference above is a loop by hand: transformers' own penalty on embeddings misses the text."""
    requests = mixed_requests(tiny_llama)
    ours = generate(tiny_llama, requests, SamplingConfig(max_new_tokens=NUM_NEW, repetition_penalty=3.0))
    theirs = [transformers_answer(tiny_llama, request, penalty=3.0) for request in requests]
    assert [list(answer.ids) for answer in ours] != theirs
