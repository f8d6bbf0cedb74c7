"""Engines that are broken on purpose: what the tests beside this one ask has to fail on each."""

import pytest
from support.engine_runs import (
    alone,
    answers,
    asked,
    assert_alike,
    assert_true,
    free_without_copying,
    kv_bytes,
)
from support.tiny_bases import FAMILIES, OTHERS, build_base, random_ids, random_prompt

from softprompt.config import EngineConfig
from softprompt.engine import Engine, engine
from softprompt.engine.kv_cache import CapacityBucket
from softprompt.engine.model_runner import BatchedRunner
from softprompt.families import KVBuffer
from softprompt.prompt import SoftPrompt


@pytest.fixture
def base():
    return build_base("llama")


def is_true(base, request, answer):
    try:
        assert_true(base, request, answer)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_wrong_prompt_no_prompt_and_a_shuffled_prompt_are_not_true(family):
    base, ids = build_base(family), random_ids(6)
    right, wrong = (random_prompt(base, 9, seed=seed) for seed in (1, 2))
    requests = [asked(base, ids, SoftPrompt(right)), asked(base, ids, SoftPrompt(wrong))]
    requests += [asked(base, ids), asked(base, ids, SoftPrompt(right.flip(0)))]
    found = answers(base, requests)
    assert [is_true(base, requests[0], answer) for answer in found] == [True, False, False, False]


def ask_both(base):
    """Two soft prompts of one length before the same text, one after the other."""
    prompts = [SoftPrompt(random_prompt(base, 9, seed=seed)) for seed in (1, 2)]
    requests, running = [asked(base, random_ids(6), prompt) for prompt in prompts], Engine(base)
    return [is_true(base, request, answers(base, [request], engine=running)[0]) for request in requests]


def test_a_cache_keyed_by_a_prompts_length_is_found_out(base, monkeypatch):
    assert ask_both(base) == [True, True]
    right = engine.prefix_keys
    nobodys = SoftPrompt(random_prompt(base, 9))
    monkeypatch.setattr(engine, "prefix_keys", lambda prompt, *rest: right(prompt and nobodys, *rest))
    assert ask_both(base) == [True, False]


def ask_some_that_leave(base):
    """The first to end has the others move up."""
    requests = [asked(base, random_ids(6, seed), 3, 3 + 6 * seed, ignore_eos=True) for seed in range(3)]
    return [is_true(base, *both) for both in zip(requests, answers(base, requests), strict=True)]


def test_a_row_that_moves_without_its_keys_and_values_is_found_out(base, monkeypatch):
    assert ask_some_that_leave(base) == [True, True, True]
    monkeypatch.setattr(CapacityBucket, "free", free_without_copying)
    assert ask_some_that_leave(base) != [True, True, True]


def ask_with_little_memory(base):
    requests = [asked(base, random_ids(56, seed), 4, 20, ignore_eos=True) for seed in range(3)]
    found = answers(base, requests, EngineConfig(kv_bytes=kv_bytes(base, 160), prefix_bytes=0))
    return [is_true(base, *both) for both in zip(requests, found, strict=True)]


def test_a_row_that_begins_again_where_it_was_is_found_out(base, monkeypatch):
    assert ask_with_little_memory(base) == [True, True, True]
    stop = BatchedRunner.stop

    def stop_but_remember(runner, row):
        computed = row.computed
        stop(runner, row)
        row.computed = max(0, computed - 1)

    monkeypatch.setattr(BatchedRunner, "stop", stop_but_remember)
    monkeypatch.setattr(Engine, "check_integrity", lambda engine: None)
    assert ask_with_little_memory(base) != [True, True, True]


def ask_beside_an_overflow():
    base = build_base("gpt2")
    overflowing = SoftPrompt(3e38 * random_prompt(base, 4).sign())
    request, running = asked(base, random_ids(6), 3), Engine(base, runner="torch")
    running.add(asked(base, random_ids(6), overflowing))
    while running.has_work:
        running.step()
    running.add(request)
    return [type(event).__name__ for _ in range(30) for event in running.step()][-1]


def test_memory_that_is_not_cleared_is_found_out(monkeypatch):
    assert ask_beside_an_overflow() == "Finished"
    monkeypatch.setattr(KVBuffer, "clear", lambda store, row: None)
    assert ask_beside_an_overflow() == "Failed"


def test_a_draw_that_depends_on_the_batch_is_found_out(base, monkeypatch):
    """Seeds taken from where a row stands in its batch, rather than from its own settings."""
    mine = asked(base, random_ids(6), 3, temperature=1.5, seed=4)
    others = [asked(base, random_ids(4, seed), 3, temperature=1.5) for seed in range(3)]
    assert_alike(answers(base, [*others, mine])[3], alone(base, mine))
    sample = engine.Sampler.sample

    def sample_by_index(sampler, logits, rows, wanted):
        for index, row in enumerate(rows):
            row.seed = index
        return sample(sampler, logits, rows, wanted)

    monkeypatch.setattr(engine.Sampler, "sample", sample_by_index)
    with pytest.raises(AssertionError):
        assert_alike(answers(base, [*others, mine])[3], alone(base, mine))
