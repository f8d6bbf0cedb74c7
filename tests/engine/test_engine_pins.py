"""Pinned soft prompts: their keys and values stay, and there is a bound to them."""

import asyncio

import pytest
import torch
from support.engine_runs import answers, asked, assert_true, kv_bytes, run_out
from support.tiny_bases import random_ids, random_prompt
from torch import nn

from softprompt.config import EngineConfig
from softprompt.engine import AsyncEngine, Engine
from softprompt.engine.prefix_cache import Prefix, PrefixCache
from softprompt.errors import MemoryLimitError
from softprompt.prompt import SoftPrompt

MODULE = nn.Identity()


def states(length):
    """48 bytes a position."""
    return Prefix({MODULE: (torch.zeros(2, length, 3), torch.zeros(2, length, 3))}, length)


def prompts(base, count, length=4):
    return [SoftPrompt(random_prompt(base, length, seed)) for seed in range(count)]


def engine_for(base, num_positions):
    return Engine(base, EngineConfig(prefix_bytes=kv_bytes(base, num_positions)))


def num_misses(engine, base, prompt):
    """Misses that one more request of a prompt makes."""
    before = engine.stats().num_prefix_misses
    engine.add(asked(base, random_ids(5), prompt, num_new=2))
    run_out(engine)
    return engine.stats().num_prefix_misses - before


def test_a_reserved_entry_is_evicted_only_after_its_release():
    cache = PrefixCache(10 * 48)
    assert cache.reserve(b"a", 4 * 48)
    for key in (b"a", b"b", b"c", b"d"):
        cache.put(key, states(4))
        cache.check_integrity()
    assert b"a" in cache and b"b" not in cache and b"d" in cache
    cache.release(b"a")
    cache.put(b"e", states(4))
    assert b"a" not in cache


def test_reserved_entries_take_at_most_half_of_the_budget():
    cache = PrefixCache(10 * 48)
    assert cache.reserve(b"a", 3 * 48)
    assert not cache.reserve(b"b", 3 * 48)
    assert cache.reserve(b"b", 2 * 48)
    assert cache.reserve(b"a", 3 * 48)  # again: nothing more is taken
    cache.release(b"b")
    cache.release(b"b")
    assert cache.reserve(b"c", 2 * 48)
    cache.check_integrity()


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_pinned_prompt_is_computed_once_however_many_come_between(tiny_llama, is_pinned):
    engine = engine_for(tiny_llama, 12)
    first, *others = prompts(tiny_llama, 6)
    if is_pinned:
        engine.pin(first)
    assert num_misses(engine, tiny_llama, first) == 1
    for other in others:
        assert num_misses(engine, tiny_llama, other) == 1
    assert num_misses(engine, tiny_llama, first) == (0 if is_pinned else 1)


def test_an_unpinned_prompt_is_evicted_like_any_other(tiny_llama):
    engine = engine_for(tiny_llama, 12)
    first, *others = prompts(tiny_llama, 6)
    engine.pin(first)
    num_misses(engine, tiny_llama, first)
    engine.unpin(first)
    for other in others:
        num_misses(engine, tiny_llama, other)
    assert num_misses(engine, tiny_llama, first) == 1


def test_pins_beyond_half_of_the_memory_are_refused(tiny_llama):
    engine = engine_for(tiny_llama, 16)
    first, second, third = prompts(tiny_llama, 3)
    engine.pin(first)
    engine.pin(second)
    with pytest.raises(MemoryLimitError, match="unpin another"):
        engine.pin(third)
    engine.unpin(first)
    engine.pin(third)
    engine.check_integrity()


def test_answers_of_pinned_prompts_are_true(tiny_llama):
    engine = engine_for(tiny_llama, 64)
    all_prompts = prompts(tiny_llama, 4)
    for prompt in all_prompts:
        engine.pin(prompt)
    requests = [asked(tiny_llama, random_ids(6, seed), prompt) for seed, prompt in enumerate(all_prompts * 2)]
    for request, answer in zip(requests, answers(tiny_llama, requests, engine=engine), strict=True):
        assert_true(tiny_llama, request, answer)


def test_a_pin_has_no_bound_where_sequences_run_one_at_a_time(tiny_llama):
    engine, (prompt,) = Engine(tiny_llama, EngineConfig(prefix_bytes=0), runner="eager"), prompts(tiny_llama, 1)
    engine.pin(prompt)
    engine.check_integrity()
    with pytest.raises(MemoryLimitError, match="unpin another"):
        Engine(tiny_llama, EngineConfig(prefix_bytes=0)).pin(prompt)


async def pin_and_unpin(base):
    engine = engine_for(base, 16)
    first, second, third = prompts(base, 3)
    async with AsyncEngine(engine) as running:
        await running.pin(first)
        await running.pin(second)
        with pytest.raises(MemoryLimitError):
            await running.pin(third)
        await running.unpin(first)
        await running.pin(third)
    await running.unpin(third)  # closed: nothing to do


def test_the_asynchronous_engine_pins_in_its_own_thread(tiny_llama):
    asyncio.run(pin_and_unpin(tiny_llama))
