"""The cache of beginnings: who goes first, who stays, what it weighs; and whose beginning is whose."""

from collections import OrderedDict
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support.engine_runs import answers, asked, assert_true, kv_bytes
from support.tiny_bases import random_ids, random_prompt
from torch import nn

from softprompt.config import EngineConfig
from softprompt.engine import Engine
from softprompt.engine.prefix_cache import BLOCK, Prefix, PrefixCache, prefix_keys
from softprompt.prompt import SoftPrompt

MODULE = nn.Identity()
BUDGET = 20 * 48  # twenty positions
KEYS = [bytes([number]) for number in range(8)]


def states(length):
    """Two tensors [2, length, 3] of float32: 48 bytes a position."""
    return Prefix({MODULE: (torch.zeros(2, length, 3), torch.zeros(2, length, 3))}, length)


class Cache(RuleBasedStateMachine):
    """Beside a dict in the order of last use, and a list of pins."""

    def __init__(self):
        super().__init__()
        self.cache, self.known, self.pinned = PrefixCache(BUDGET), OrderedDict(), []

    @rule(key=st.sampled_from(KEYS), length=st.integers(1, 25))
    def put(self, key, length):
        self.cache.put(key, states(length))
        if key in self.known:
            return
        free = [old for old in self.known if old not in self.pinned]
        if sum(self.known[old] for old in self.known if old in self.pinned) + length > 20:
            return
        while sum(self.known.values()) + length > 20:
            del self.known[free.pop(0)]
        self.known[key] = length

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3))
    def pin(self, keys):
        found = self.cache.pin(keys)
        first = next((key for key in keys if key in self.known), None)
        assert (found is None) == (first is None)
        if first is not None:
            assert found.length == self.known[first]
            self.known.move_to_end(first)
            self.pinned.append(first)

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 99))
    def unpin(self, which):
        key = self.pinned.pop(which % len(self.pinned))
        self.cache.unpin(self.cache.entries[key])

    @invariant()
    def is_as_the_dict_says(self):
        self.cache.check_integrity()
        assert list(self.cache.entries) == list(self.known)
        assert self.cache.num_bytes == 48 * sum(self.known.values()) <= BUDGET
        assert self.cache.num_pins == len(self.pinned)
        assert all(entry.pins == self.pinned.count(key) for key, entry in self.cache.entries.items())


def test_the_least_recently_used_prefixes_are_evicted_first_and_pinned_ones_stay():
    run_state_machine_as_test(Cache)


def test_an_entry_that_can_never_fit_evicts_no_other():
    """It once emptied the cache first, and then was not kept either."""
    cache = PrefixCache(BUDGET)
    cache.put(KEYS[0], states(5))
    cache.put(KEYS[1], states(21))
    assert KEYS[0] in cache and KEYS[1] not in cache


PROMPTS = [None, *(SoftPrompt(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))) for seed in range(3))]
SAME = SoftPrompt(PROMPTS[1].tensor.clone())


SIDE = st.tuples(
    st.sampled_from([*PROMPTS, SAME]), st.integers(0, 40), st.booleans(), st.sampled_from([None, "", "key-1", "\ud800"])
)


@settings(deadline=None)
@given(SIDE, SIDE, st.integers(0, 70))
def test_rows_share_a_key_exactly_where_their_prompt_first_tokens_and_salt_are_the_same(one, other, num_common):
    (first_prompt, *_, salt), (second_prompt, *_, other_salt) = one, other
    first, second = (random_ids(num_common) + random_ids(side[1], seed) for seed, side in enumerate((one, other)))
    keys, others = (
        dict(prefix_keys(prompt, ids, again, salt)) for ids, (prompt, _, again, salt) in ((first, one), (second, other))
    )
    num_virtual = 0 if first_prompt is None else 3
    is_same = first_prompt is second_prompt or {first_prompt, second_prompt} == {PROMPTS[1], SAME}
    for length, key in keys.items():
        own = length - num_virtual
        is_own_salt = own == 0 or salt == other_salt  # the soft prompt itself is everybody's
        expected = is_same and is_own_salt and length in others and first[:own] == second[:own]
        assert (key in others.values()) == expected == (others.get(length) == key)


def test_beginnings_are_the_soft_prompt_and_whole_blocks_and_never_the_last_token():
    ids = random_ids(2 * BLOCK)
    assert [length for length, _ in prefix_keys(None, ids)] == [BLOCK]
    assert [length for length, _ in prefix_keys(PROMPTS[1], ids)] == [3, 3 + BLOCK]
    assert [length for length, _ in prefix_keys(PROMPTS[1], ids, True)] == [3, 3 + BLOCK, 2 + 2 * BLOCK]
    assert [length for length, _ in prefix_keys(PROMPTS[1], ids[:1], True)] == [3]
    assert prefix_keys(None, ids[:1], True) == []


def test_prefix_bytes_are_the_size_of_the_cached_tensors(tiny_llama):
    engine, prompt = Engine(tiny_llama), SoftPrompt(random_prompt(tiny_llama, 9))
    requests = [asked(tiny_llama, random_ids(40) + random_ids(count), prompt) for count in (1, 2)]
    for request in requests:
        answers(tiny_llama, [request], engine=engine)
    kept = [
        part
        for entry in engine.runners.prefix_cache.entries.values()
        for pair in entry.states.values()
        for part in pair
    ]
    assert engine.stats().prefix_bytes == sum(part.untyped_storage().nbytes() for part in kept)
    assert engine.stats().prefix_bytes == kv_bytes(tiny_llama, 9 + (9 + 32))


def test_few_bytes_for_prefixes_mean_misses_and_the_same_answers(tiny_llama):
    prompts = [SoftPrompt(random_prompt(tiny_llama, 20, seed)) for seed in range(5)]
    engine = Engine(tiny_llama, EngineConfig(prefix_bytes=kv_bytes(tiny_llama, 45)))
    for turn in range(2):
        requests = [asked(tiny_llama, random_ids(5, turn), prompt) for prompt in prompts]
        for request, answer in zip(requests, answers(tiny_llama, requests, engine=engine), strict=True):
            assert_true(tiny_llama, request, answer)
    assert engine.stats().num_prefixes == 2
    assert [prompt in (3, 4) for prompt in range(5)] == [
        prefix_keys(prompt, (5,))[0][1] in engine.runners.prefix_cache for prompt in prompts
    ]


def test_requests_that_wait_for_a_pending_soft_prompt_start_when_it_is_cached(tiny_llama):
    """One computes it, the others wait a step rather than compute it too."""
    engine, prompt = Engine(tiny_llama), SoftPrompt(random_prompt(tiny_llama, 40))
    requests = [asked(tiny_llama, random_ids(3, seed), prompt, ignore_eos=True) for seed in range(4)]
    numbers = [engine.add(request) for request in requests]
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_read_tokens) == (1, 43)
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_read_tokens) == (4, 43 + 1 + 9)
    assert engine.stats().num_prefix_hits == 3
    assert len(numbers) == 4
    engine.close()


def test_requests_do_not_wait_for_a_soft_prompt_that_cannot_be_cached(tiny_llama):
    """They once came into the batch one by one, each after the one before had read the same in vain."""
    engine, prompt = (
        Engine(tiny_llama, EngineConfig(prefix_bytes=kv_bytes(tiny_llama, 39))),
        random_prompt(tiny_llama, 40),
    )
    for seed in range(4):
        engine.add(asked(tiny_llama, random_ids(3, seed), SoftPrompt(prompt)))
    engine.step()
    assert engine.stats().num_running == 4
    engine.close()


def test_a_request_that_waits_for_a_prefix_starts_when_the_computing_one_is_aborted(tiny_llama):
    engine, prompt = Engine(tiny_llama, EngineConfig(max_step_tokens=2)), SoftPrompt(random_prompt(tiny_llama, 40))
    first, request = engine.add(asked(tiny_llama, (5, 6), prompt)), asked(tiny_llama, (7, 8), prompt)
    engine.step()
    engine.abort(first)
    (answer,) = answers(tiny_llama, [request], engine=engine)
    assert_true(tiny_llama, request, answer)


def num_read(engine, request):
    """Positions that the engine runs until the first token of a request."""
    before, number = engine.stats().num_read_tokens, engine.add(request)
    while not any(event.request == number for event in engine.step()):
        pass
    read = engine.stats().num_read_tokens - before
    while engine.has_work:
        engine.step()
    return read


def test_a_text_that_another_salt_has_sent_is_read_as_if_nobody_had(tiny_llama):
    """The work until the first token once told, in steps of 16 tokens, what others had asked."""
    engine, prompt = Engine(tiny_llama), SoftPrompt(random_prompt(tiny_llama, 9))
    request = replace(asked(tiny_llama, random_ids(50), prompt), cache_salt="alice")
    assert [num_read(engine, request) for _ in range(3)] == [59, 50, 2]  # nothing, the soft prompt, 48 of the text
    for salt in ("bob", None, "", "alice "):
        assert num_read(engine, replace(request, cache_salt=salt)) == 50
    assert num_read(engine, request) == 2


def test_requests_do_not_wait_for_a_text_under_another_salt(tiny_llama):
    engine, text = Engine(tiny_llama, EngineConfig(max_step_tokens=8)), random_ids(50)
    requests = [replace(asked(tiny_llama, text), cache_salt=salt) for salt in ("alice", "bob")]
    answers(tiny_llama, [requests[0]], engine=engine)  # seen before: who comes now promises it
    engine.add(requests[0])
    engine.step()
    engine.add(requests[1])
    engine.step()
    assert engine.stats().num_running == 2
    engine.add(requests[0])
    engine.step()
    assert engine.stats().num_running == 2  # the control: with its salt one waits
    engine.close()
