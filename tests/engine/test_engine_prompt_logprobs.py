"""Log-probabilities of the text itself are plain concatenation's, however it is read and whoever runs beside it."""

from dataclasses import replace
from functools import lru_cache

import pytest
from support.engine_runs import (
    Ledger,
    answers,
    asked,
    assert_text_true,
    assert_true,
    kv_bytes,
    run_out,
    true_log_probs,
)
from support.tiny_bases import FAMILIES, OTHERS, build_base, random_ids, random_prompt

from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import Engine, Failed, PromptLogprobs, Request, Tokens, prompt_logprobs
from softprompt.errors import ConfigError
from softprompt.families import Forward
from softprompt.prompt import SoftPrompt

ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.medium) for family in OTHERS)]
build = lru_cache(maxsize=None)(build_base)


def told(base, length, prompt=None, num_tops=2, seed=0, num_new=4, **more):
    """A request that reports on its text of `length` random tokens."""
    request = asked(base, random_ids(length, seed), prompt, num_new, ignore_eos=True)
    return replace(request, num_text_log_probs=num_tops, **more)


def read_all(base, requests, config=None, engine=None):
    """What is told of each request's text, and the engine."""
    engine = engine or Engine(base, config)
    numbers = [engine.add(request) for request in requests]
    ledger = run_out(engine)
    for number, request in zip(numbers, requests, strict=True):
        if request.num_text_log_probs is None:
            assert number not in ledger.texts
        if not request.is_text_only:
            assert_true(base, request, ledger.answers(number)[0])
    return [ledger.texts.get(number) for number in numbers], engine


def mixed(base):
    return [
        told(base, 9, 3, seed=1),
        told(base, 19, None, seed=2, num_tops=0),
        told(base, 1, 1, seed=3, num_new=1),
        asked(base, random_ids(12, 4), 9),
        told(base, 1, None, seed=5),
        told(base, 0, 4),
        told(base, 30, 20, seed=6, num_tops=5),
        asked(base, random_ids(7, 7), None),
        told(base, 14, 9, seed=8, is_text_only=True),
    ]


@pytest.mark.parametrize("max_step_tokens", [3, 64])
@pytest.mark.parametrize("family", ALL)
def test_prompt_logprobs_alone_and_in_a_batch_are_the_slow_truth(family, max_step_tokens):
    base = build(family)
    requests = mixed(base)
    found, _ = read_all(base, requests, EngineConfig(max_step_tokens=max_step_tokens, max_rows=6))
    for request, text in zip(requests, found, strict=True):
        if request.num_text_log_probs is not None:
            assert_text_true(base, request, text)
    (alone,), _ = read_all(base, requests[:1])
    assert_text_true(base, requests[0], alone)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_prompt_logprobs_without_the_compiled_attention_are_true(family):
    base = build(family)
    request = told(base, 20, 9)
    (text,), _ = read_all(base, [request], engine=Engine(base, EngineConfig(max_step_tokens=3), runner="torch"))
    assert_text_true(base, request, text)


@pytest.mark.parametrize("family", ALL)
def test_another_prompt_none_and_a_shuffled_one_are_not_true(family):
    """The control: what the tests here ask has to fail on each, at the first token already."""
    base = build(family)
    request = told(base, 6, 9)
    (text,), _ = read_all(base, [request])
    assert_text_true(base, request, text)
    for wrong in (random_prompt(base, 9, seed=77), request.prompt.tensor.flip(0)):
        with pytest.raises(AssertionError):
            assert_text_true(base, request, text, wrong)
        assert abs(text[0].log_prob - float(true_log_probs(base, request, wrong)[0][text[0].id])) > 1e-5
    with pytest.raises(AssertionError):
        assert_text_true(base, replace(request, prompt=None), text)


@pytest.mark.parametrize("family", ALL)
def test_prompt_logprobs_behind_cached_prefixes_are_the_slow_truth(family):
    """The text is run though its beginning is there; only the soft prompt is not run again, but for its last vector."""
    base = build(family)
    prompt, beginning = SoftPrompt(random_prompt(base, 9)), random_ids(40)
    engine = Engine(base)
    for count in (3, 5):
        answers(base, [asked(base, beginning + random_ids(count), prompt, 2, ignore_eos=True)], engine=engine)
    for count, num_virtual in ((7, 9), (8, 9), (6, 0)):
        before = engine.stats()
        request = told(base, 0, prompt if num_virtual else None, num_new=2)
        request = replace(request, ids=beginning + random_ids(count))
        (text,), _ = read_all(base, [request], engine=engine)
        assert_text_true(base, request, text)
        after = engine.stats()
        assert after.num_read_tokens - before.num_read_tokens == 40 + count + 1 + (1 if num_virtual else 0)
        assert after.num_prefix_hits - before.num_prefix_hits == (1 if num_virtual else 0)
    # and the other way: who comes behind one that reported takes what that one left
    before = engine.stats().num_read_tokens
    answers(base, [asked(base, beginning + random_ids(4), prompt, 2, ignore_eos=True)], engine=engine)
    assert engine.stats().num_read_tokens - before == 8 + 4 + 1


def test_a_request_with_prompt_logprobs_waits_for_a_pending_soft_prompt_but_for_no_text():
    base = build("llama")
    prompt, engine = SoftPrompt(random_prompt(base, 40)), Engine(base)
    requests = [replace(told(base, 0, prompt), ids=(*random_ids(33), seed)) for seed in (5, 6, 7)]
    found, engine = read_all(base, requests, engine=engine)
    for request, text in zip(requests, found, strict=True):
        assert_text_true(base, request, text)
    assert engine.stats().num_prefix_hits == 2
    assert engine.stats().num_read_tokens == 40 + 3 * (34 + 3) + 2  # twice the prompt's last vector


@pytest.mark.parametrize("family", ALL)
def test_prompt_logprobs_of_a_preempted_sequence_are_computed_once_per_token(family, monkeypatch):
    base, tokens = build(family), []
    logprobs = prompt_logprobs.logprobs

    def counted(logits, ids, counts):
        tokens.extend(ids)
        return logprobs(logits, ids, counts)

    monkeypatch.setattr(prompt_logprobs, "logprobs", counted)
    older = [asked(base, random_ids(5, seed), None, 60, ignore_eos=True) for seed in range(2)]
    mine = told(base, 60, 14, num_new=3)
    engine = Engine(base, EngineConfig(kv_bytes=kv_bytes(base, 260), prefix_bytes=0, max_step_tokens=1))
    ledger, lengths = Ledger(), [0]
    for request in older:
        engine.add(request)
    number = engine.add(mine)

    def watch(engine):
        lengths.extend(len(each.prompt_log_probs or ()) for each in engine.scheduler.waiting if each.owner.id == number)

    run_out(engine, ledger, watch)
    assert engine.stats().num_preemptions > 0
    assert max(lengths) > 0, "it was not in the midst of its text when it had to give its memory back"
    assert tokens == list(mine.ids)
    assert_text_true(base, mine, ledger.texts[number])
    assert_true(base, mine, ledger.answers(number)[0])


@pytest.mark.parametrize("max_step_tokens", [3, 64])
def test_prompt_logprobs_of_sequences_that_run_one_at_a_time_are_true(max_step_tokens):
    base = build_base("llama")
    requests = mixed(base)[:7]
    engine = Engine(base, EngineConfig(max_step_tokens=max_step_tokens), runner="eager")
    found, _ = read_all(base, requests, engine=engine)
    for request, text in zip(requests, found, strict=True):
        if request.num_text_log_probs is not None:
            assert_text_true(base, request, text)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gemma2"])
def test_neighbours_have_the_same_bits(family):
    """A step is the same whether somebody in it reports or not."""
    base = build(family)
    plain = [asked(base, random_ids(12, seed), seed + 1, 9, ignore_eos=True) for seed in range(4)]

    def ask(num_tops):
        ledger, engine = Ledger(), Engine(base, EngineConfig(max_step_tokens=5))
        one = replace(told(base, 25, 7, num_tops), num_text_log_probs=num_tops)
        numbers = [engine.add(request) for request in (plain[0], plain[1], one, plain[2], plain[3])]
        run_out(engine, ledger)
        return [ledger.answers(number) for number in numbers], engine.counts

    assert ask(None) == ask(3)


@pytest.mark.parametrize("runner", ["auto", "eager"])
def test_prompt_logprobs_of_several_choices_come_once_and_before_any_of_their_tokens(runner):
    base = build_base("llama")
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.9, ignore_eos=True)
    request = replace(told(base, 30, 9), num_choices=3, sampling=sampling)
    engine, events = Engine(base, EngineConfig(max_step_tokens=8), runner=runner), []
    engine.add(request)
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    assert [type(event) for event in events].count(PromptLogprobs) == 1 and isinstance(events[0], PromptLogprobs)
    assert_text_true(base, request, events[0].log_probs)
    plain = Engine(base)
    plain.add(replace(request, num_text_log_probs=None))
    assert [answer.ids for answer in run_out(plain).answers(0)] == [answer.ids for answer in events[-1].answers]


def test_a_text_only_request_has_no_answer():
    base = build("llama")
    engine, request = Engine(base), told(base, 9, 3, is_text_only=True, num_choices=2)
    engine.add(request)
    text, first, second, end = engine.step() + engine.step()
    assert_text_true(base, request, text.log_probs)
    empty = end.answers[0]
    assert (empty.ids, empty.text, empty.finish_reason) == ((), "", "length") and end.answers == (empty, empty)
    assert (first, second) == (Tokens(0, 0, (), "", (), empty), Tokens(0, 1, (), "", (), empty))


def test_large_vocabularies_go_in_blocks(monkeypatch):
    base, sizes = build("llama"), []
    logits = Forward.logits

    def watched(forward, hidden):
        sizes.append(len(hidden))
        return logits(forward, hidden)

    monkeypatch.setattr(Forward, "logits", watched)
    monkeypatch.setattr(prompt_logprobs, "_MAX_LOGITS", 4 * base.vocab_size + 1)
    request = told(base, 30, 9, num_new=1)
    (text,), _ = read_all(base, [request])
    assert sizes == [4] * 7 + [2, 1]
    assert_text_true(base, request, text)


def test_a_text_with_nan_fails_its_request_and_nobody_elses(monkeypatch):
    base = build("llama")
    good, engine, ledger = told(base, 9, 3), Engine(base), Ledger()
    logprobs = prompt_logprobs.logprobs

    def broken(logits, ids, counts):
        found = logprobs(logits, ids, counts)
        return [(float("nan") if token == 42 else value, tops) for token, (value, tops) in zip(ids, found, strict=True)]

    monkeypatch.setattr(prompt_logprobs, "logprobs", broken)
    bad = engine.add(replace(good, ids=(*random_ids(9, 5), 42, 7)))
    numbers = [engine.add(replace(good, ids=tuple(i for i in good.ids if i != 42)))]
    run_out(engine, ledger)
    assert isinstance(ledger.ends[bad], Failed) and "NaN" in ledger.ends[bad].why and bad not in ledger.texts
    assert numbers[0] in ledger.texts


def test_a_number_of_alternatives_beyond_the_vocabulary_is_refused():
    base = build("llama")
    for wrong in (-1, base.vocab_size + 1):
        with pytest.raises(ConfigError, match=f"num_text_log_probs is {wrong}; it must be between 0 and 97"):
            Engine(base).add(Request((5,), num_text_log_probs=wrong))


def test_a_choice_emits_its_end_before_the_others_have_ended():
    """Of two that end apart the first does not wait for the second."""
    base = build("llama")
    sampling = SamplingConfig(max_new_tokens=40, temperature=1.5, stop_ids=tuple(range(3, 20)), seed=2)
    engine, events = Engine(base), []
    number = engine.add(replace(asked(base, random_ids(5), 3), sampling=sampling, num_choices=4))
    while engine.has_work:
        events += [(engine.counts.num_steps, event) for event in engine.step()]
    (end,) = [event for _, event in events if not isinstance(event, Tokens)]
    ends = {event.choice: (step, event.end) for step, event in events if isinstance(event, Tokens) and event.end}
    assert end.request == number and tuple(ends[choice][1] for choice in range(4)) == end.answers
    assert len({step for step, _ in ends.values()}) > 1
