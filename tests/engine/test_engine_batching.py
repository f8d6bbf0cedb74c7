"""A request answers the same alone, in any batch and by the slow truth: every family, however the engine runs it."""

import logging
import random
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from support.engine_runs import (
    Ledger,
    alone,
    answers,
    asked,
    assert_alike,
    assert_empty,
    assert_true,
    kv_bytes,
    run_out,
)
from support.tiny_bases import FAMILIES, OTHERS, build_base, random_ids, random_prompt

from softprompt.config import EngineConfig
from softprompt.engine import Engine, model_runner
from softprompt.prompt import SoftPrompt

ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.medium) for family in OTHERS)]
build = lru_cache(maxsize=None)(build_base)


def mixed(base):
    """Soft prompts of many lengths and none, texts of many lengths and none."""
    return [
        asked(base, random_ids(4, 1), 3, num_new=12),
        asked(base, random_ids(19, 2), 9, num_new=5),
        asked(base, random_ids(6, 3), None, num_new=9),
        asked(base, random_ids(1, 4), 20, num_new=7),
        asked(base, (), 3, num_new=3),
        asked(base, random_ids(12, 5), 64, num_new=9),
        asked(base, random_ids(40, 6), None, num_new=4),
    ]


@pytest.mark.parametrize("family", ALL)
def test_a_request_answers_truly_whoever_joins_and_leaves(family):
    """Texts are read three tokens at a time; strangers come, and some are sent away in the midst of it."""
    base, chance, ledger = build(family), random.Random(family), Ledger()
    engine = Engine(base, EngineConfig(max_step_tokens=3, max_rows=5))
    coming, mine, strangers = mixed(base)[:5], {}, []
    while coming or engine.has_work:
        if coming and chance.random() < 0.4:
            request = coming.pop(chance.randrange(len(coming)))
            mine[engine.add(request)] = request
        if chance.random() < 0.2 and len(strangers) < 4:
            strangers.append(engine.add(asked(base, random_ids(chance.randint(1, 20), chance.randint(0, 99)))))
        if strangers and chance.random() < 0.1:
            engine.abort(chance.choice(strangers))
        ledger.record(engine.step())
        engine.check_integrity()
    assert_empty(engine)
    for number, request in mine.items():
        assert_true(base, request, ledger.answers(number)[0])


@pytest.mark.parametrize("runner", ["auto", "torch"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_answers_alone_and_in_a_batch_are_the_slow_truth(family, runner):
    base = build(family)
    requests, engine = mixed(base), Engine(base, runner=runner)
    for request, answer in zip(requests, answers(base, requests, engine=engine), strict=True):
        assert_true(base, request, answer)
    for request in requests[1::3]:
        assert_true(base, request, answers(base, [request], engine=Engine(base, runner=runner))[0])


@pytest.mark.parametrize("family", ALL)
def test_three_choices_are_three_answers_with_seeds_of_their_own(family):
    base = build(family)
    request = replace(asked(base, random_ids(20, 2), 9, 5, temperature=0.8, seed=5), num_choices=3)
    engine = Engine(base, EngineConfig(max_step_tokens=16))
    numbers = [engine.add(request), engine.add(asked(base, random_ids(7, 3), 3, 5))]
    together = run_out(engine).answers(numbers[0])
    assert len({answer.ids for answer in together}) == 3
    for choice, answer in enumerate(together):
        own = replace(request, num_choices=1, sampling=replace(request.sampling, seed=5 + choice))
        assert_alike(answer, alone(base, own))


@pytest.mark.parametrize("family", ALL)
def test_a_shared_prefix_of_later_requests_is_computed_once(family):
    """The second that begins so leaves the beginning to the third; the soft prompt's part came from the first."""
    base, beginning = build(family), random_ids(40)
    engine, prompt, num_read = Engine(base), SoftPrompt(random_prompt(base, 9)), []
    for number, count in enumerate((3, 5, 8)):
        request, before = asked(base, beginning + random_ids(count), prompt, num_new=5, ignore_eos=True), engine.stats()
        (answer,) = answers(base, [request], engine=engine)
        assert_true(base, request, answer)
        after = engine.stats()
        num_read.append(after.num_read_tokens - before.num_read_tokens - 4)
        assert after.num_prefix_hits - before.num_prefix_hits == (number > 0)
    assert num_read == [9 + 43, 45, 16]  # all; all but the soft prompt; what follows the last whole block of 16


@pytest.mark.parametrize("family", ALL)
def test_requests_that_come_together_share_their_prefix(family):
    base, beginning = build(family), random_ids(40)
    prompt = SoftPrompt(random_prompt(base, 33))
    requests = [asked(base, beginning + random_ids(count), prompt, num_new=5) for count in (3, 5)]
    engine = Engine(base)
    for request, answer in zip(requests, answers(base, requests, engine=engine), strict=True):
        assert_true(base, request, answer)
    assert (engine.stats().num_prefix_hits, engine.stats().num_prefixes) == (1, 2)


@pytest.mark.parametrize("family", ALL)
def test_preempted_sequences_answer_as_if_they_had_not_been(family):
    base = build(family)
    requests = [
        asked(base, random_ids(45, seed), length, num_new=14, ignore_eos=True)
        for seed, length in enumerate((None, 9, 14))
    ]
    engine = Engine(base, EngineConfig(kv_bytes=kv_bytes(base, 200), prefix_bytes=0))
    for request, answer in zip(requests, answers(base, requests, engine=engine), strict=True):
        assert_true(base, request, answer)
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("family", ALL)
def test_a_base_that_fails_its_self_test_answers_one_request_at_a_time(family, monkeypatch, caplog):
    base = build_base(family)
    monkeypatch.setattr(model_runner, "why_not_batched", lambda base, forward: "it is Monday")
    with caplog.at_level(logging.WARNING):
        engine = Engine(base, EngineConfig(max_step_tokens=3))
    assert f"base 'tiny-{family}': answers run one row at a time, which is slow: it is Monday" in caplog.text
    assert engine.notes == ("it is Monday",)
    requests = mixed(base)[:4]
    for request, answer in zip(requests, answers(base, requests, engine=engine), strict=True):
        assert_true(base, request, answer)
    assert engine.stats().kv_bytes == 0


def test_a_partial_stop_string_is_printed_when_the_answer_ends_without_the_rest():
    base = build("llama")
    free = alone(base, asked(base, random_ids(5), 3, 6))
    held = alone(base, asked(base, random_ids(5), 3, 6, stop=(free.text.split()[-1] + " and on",)))
    assert (held.text, held.finish_reason) == (free.text, "length")


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 6.0, "short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@torch.no_grad()
def transformers_ids(base, request):
    text = base.embed(torch.tensor(request.ids))
    whole = text if request.prompt is None else torch.cat([request.prompt.tensor, text])
    out = base.model.generate(
        inputs_embeds=whole[None], attention_mask=torch.ones(1, len(whole), dtype=torch.long),
        max_new_tokens=request.sampling.max_new_tokens, do_sample=False,
    )  # fmt: skip
    return tuple(token for token in out[0].tolist() if token not in base.stop_ids)


@pytest.mark.parametrize("max_step_tokens", [3, 64])
def test_rows_beyond_the_rotations_first_length_run_by_themselves_and_whole(max_step_tokens):
    """In pieces a long text would be rotated as a short one at first, and answered otherwise."""
    base = build_base("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=16)
    sizes = [(4, 3, 5), (20, 5, 12), (6, 5, 12), (30, None, 12), (3, None, 8), (40, 20, 12), (9, 3, 12)]
    requests = [asked(base, random_ids(text, text), length, num_new=num) for text, length, num in sizes]
    engine = Engine(base, EngineConfig(max_step_tokens=max_step_tokens))
    found = answers(base, requests, engine=engine)
    assert [answer.ids for answer in found] == [transformers_ids(base, request) for request in requests]
    assert engine.stats().kv_bytes > 0  # the short ones ran together


def test_long_rows_answer_as_alone_though_memory_is_short():
    base = build_base("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=16)
    requests = [asked(base, random_ids(text, text), length) for text, length in ((30, 5), (20, None), (40, 20), (1, 2))]
    found = answers(base, requests, EngineConfig(kv_bytes=kv_bytes(base, 96), prefix_bytes=0))
    assert [answer.ids for answer in found] == [transformers_ids(base, request) for request in requests]


def test_dynamic_rotations_go_as_far_as_the_base_does():
    base = build_base("llama", rope_parameters=DYNAMIC_ROPE, max_position_embeddings=24)
    requests = [asked(base, random_ids(text, text), length) for text, length in ((8, 4), (3, None), (12, None), (1, 9))]
    for request, answer in zip(requests, answers(base, requests, EngineConfig(max_step_tokens=3)), strict=True):
        assert_true(base, request, answer)
        assert answer.ids == transformers_ids(base, request)
