"""Whoever runs beside a request, and whatever happens to its memory: its answer is the one that it gives alone."""

from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_runs import (
    Ledger,
    alone,
    answers,
    asked,
    assert_alike,
    assert_empty,
    kv_bytes,
    run_out,
    samplings,
)
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.config import EngineConfig
from softprompt.engine import Engine, Request
from softprompt.prompt import SoftPrompt

FAMILIES = ["llama", "bloom", "gpt2", "mistral_window"]
build = lru_cache(build_base)
MINE = {
    "greedy": {},
    "drawn": {"temperature": 1.3, "seed": 11},
    "drawn_from_the_best": {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 12},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "seed": 13},
}


@lru_cache
def mine_and_its_answer(family, way, num_new=14):
    request = asked(build(family), random_ids(7, 1), 9, num_new, ignore_eos=True, **MINE[way])
    return request, alone(build(family), request)


@lru_cache
def prompt_of(family, length):
    return SoftPrompt(random_prompt(build(family), length, seed=length)) if length else None


def neighbours():
    """Soft prompt, text, wishes, and at which step it comes."""
    texts = st.tuples(st.integers(1, 20), st.integers(0, 3)).map(lambda pair: random_ids(*pair))
    shared = st.integers(0, 9).map(lambda count: random_ids(7, 1) + random_ids(count))  # begins as mine does
    return st.lists(
        st.tuples(st.sampled_from([0, 2, 9, 20]), texts | shared, samplings(), st.integers(0, 5)),
        min_size=1,
        max_size=4,
    )


RUNNERS = st.sampled_from(["auto", "torch"])


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(FAMILIES), st.sampled_from(list(MINE)), neighbours(), st.integers(0, 5), RUNNERS)
def test_an_answer_is_the_same_beside_any_neighbours(family, way, others, my_step, runner):
    (mine, truth), ledger, number = mine_and_its_answer(family, way), Ledger(), None
    engine = Engine(build(family), EngineConfig(max_step_tokens=8), runner=runner)
    coming = [(step, Request(ids, prompt_of(family, length), wishes)) for length, ids, wishes, step in others]
    for now in range(100):
        number = engine.add(mine) if now == my_step else number
        for request in [request for step, request in coming if step == now]:
            engine.add(request)
        ledger.record(engine.step())
        if number in ledger.ends:
            break
    engine.close()
    assert_empty(engine)
    assert_alike(ledger.answers(number)[0], truth)


@pytest.mark.parametrize("way", MINE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_seeded_answer_is_the_same_after_preemption(family, way):
    """The older ones grow until the youngest, which is mine, has to make room, in the midst of its answer."""
    base, (mine, truth) = build(family), mine_and_its_answer(family, way)
    older = [asked(base, random_ids(56, seed), None, 20, ignore_eos=True) for seed in range(2)]
    engine, was_answering = Engine(base, EngineConfig(kv_bytes=kv_bytes(base, 200))), False
    numbers, ledger = [engine.add(request) for request in [*older, mine]], Ledger()
    while not engine.stats().num_preemptions:
        was_answering = bool(ledger.tokens[numbers[-1]])
        ledger.record(engine.step())
    assert was_answering
    assert numbers[-1] in [row.owner.id for row in engine.scheduler.waiting]
    assert_alike(run_out(engine, ledger).answers(numbers[-1])[0], truth)


@pytest.mark.parametrize("way", MINE)
def test_each_of_several_choices_is_its_answer_alone_when_memory_is_short(way):
    base = build("llama")
    request = asked(base, random_ids(50, 1), 9, 25, ignore_eos=True, **MINE[way])
    engine = Engine(base, EngineConfig(kv_bytes=kv_bytes(base, 160), prefix_bytes=0))
    number = engine.add(replace(request, num_choices=3))
    together = run_out(engine).answers(number)
    assert engine.stats().num_preemptions
    for choice, answer in enumerate(together):
        sampling = replace(request.sampling, seed=request.sampling.seed + choice)
        assert_alike(answer, alone(base, replace(request, sampling=sampling)))


def test_a_neighbour_that_asks_for_nothing_but_my_prompt_and_text_gets_its_own_answer():
    """Same keys and values, another seed, another answer; and mine stays."""
    base, (mine, truth) = build("llama"), mine_and_its_answer("llama", "drawn")
    other = replace(mine, sampling=replace(mine.sampling, seed=99))
    found = answers(base, [mine, other, mine])
    assert found[0].ids == found[2].ids == truth.ids != found[1].ids
