"""Encoder-decoders in the engine: answers are transformers' own over concatenated embeddings, whoever else runs."""

import asyncio
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from support.engine_runs import (
    Ledger,
    alone,
    answers,
    asked,
    assert_alike,
    assert_empty,
    free_without_copying,
    run_out,
)
from support.family_configs import each_of
from support.seq2seq_bases import FAMILIES, build_model, build_seq2seq, build_tokenizer, plain_pair_logits
from support.tiny_bases import VOCAB, random_ids, random_prompt

from softprompt.base import freeze_base
from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import AsyncEngine, Engine, Finished, Request, generate
from softprompt.engine.kv_cache import CapacityBucket
from softprompt.errors import ConfigError, LengthError, MemoryLimitError
from softprompt.families import Seq2SeqForward
from softprompt.families.native import native_library
from softprompt.families.thin_linear import quantised
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord

FEW = ("t5", "mbart50", "pegasus")  # biases by distance; a language before the answer; scaled embeddings
NATS = {torch.float64: 1e-5, torch.float32: 5e-4}  # transformers' own float32 answers differ by 1e-4 between shapes


@cache
def build(family, dtype=torch.float64):
    return build_seq2seq(family, dtype=dtype)


def both_sides(base, length, seed=0):
    """A prompt of `length` vectors for the encoder and as many for the decoder."""
    record = PromptRecord(form=InputForm(has_decoder_prompt=True))
    return SoftPrompt(random_prompt(base, 2 * length, seed=seed), record)


def sides(request):
    """The vectors of the encoder's side and of the decoder's."""
    prompt = request.prompt
    if prompt is None:
        return None, None
    whole, own = prompt.tensor, prompt.num_virtual_tokens
    return whole[:own], whole[own:] if prompt.num_decoder_tokens else None


def mixed(base):
    """Texts of many lengths; soft prompts of many lengths, for both sides, and none."""
    return [
        asked(base, (*random_ids(4, 1), 2), 3, num_new=12),
        asked(base, (*random_ids(19, 2), 2), 9, num_new=5),
        asked(base, (*random_ids(6, 3), 2), None, num_new=9),
        asked(base, (*random_ids(1, 4), 2), both_sides(base, 4, seed=4), num_new=7),
        asked(base, (), 3, num_new=3),
        asked(base, (*random_ids(40, 6), 2), both_sides(base, 2, seed=6), num_new=30),
        asked(base, (*random_ids(12, 5), 2), 30, num_new=20),
    ]


@torch.no_grad()
def true_log_probs(base, request, ids, encoder=None):
    """[T + 1, V]: of each id of an answer and of what follows, by one plain forward; by another prompt as a control."""
    own, decoder = sides(request)
    own = own if encoder is None else encoder
    return torch.log_softmax(plain_pair_logits(base, request.ids, (*ids, 0), own, decoder).float(), dim=-1)


def assert_true(base, request, answer):
    """A greedy answer: each token the likeliest of one plain forward, with its log-probability."""
    nats = NATS[base.dtype]
    log_probs = true_log_probs(base, request, answer.ids)
    assert len(answer.log_probs) == len(answer.ids)
    for row, token, ours in zip(log_probs, answer.ids, answer.log_probs, strict=False):
        assert float(row.max() - row[token]) < 2 * nats
        assert ours == pytest.approx(float(row[token]), abs=nats)
    if answer.finish_reason == "length":
        assert len(answer.ids) == request.sampling.max_new_tokens
    else:
        assert answer.end_log_prob.log_prob == pytest.approx(float(log_probs[-1, answer.stopped_by]), abs=nats)


@pytest.mark.parametrize(
    ("runner", "dtype"), [("auto", torch.float32), ("torch", torch.float64), ("eager", torch.float64)]
)
@pytest.mark.parametrize("family", each_of(FAMILIES, FEW))
def test_answers_in_a_batch_are_those_of_plain_forwards_over_concatenated_embeddings(family, runner, dtype):
    base = build(family, dtype)
    requests, engine = mixed(base), Engine(base, runner=runner)
    for request, answer in zip(requests, answers(base, requests, engine=engine), strict=True):
        assert_true(base, request, answer)


@pytest.mark.parametrize("family", each_of(FAMILIES, FEW))
def test_another_prompt_or_none_would_not_have_answered_so(family):
    base = build(family)
    (answer,) = answers(base, [mixed(base)[0]])
    truth = true_log_probs(base, mixed(base)[0], answer.ids)
    for other in (random_prompt(base, 3, seed=9), random_prompt(base, 3, seed=3).flip(0), torch.zeros(0, 16)):
        assert not torch.allclose(true_log_probs(base, mixed(base)[0], answer.ids, other), truth, atol=1e-3)


@pytest.mark.parametrize("family", each_of(FAMILIES, FEW))
def test_greedy_answers_are_those_of_transformers_own_generate(family):
    base = build(family)
    for request in mixed(base)[:3]:
        (answer,) = answers(base, [request])
        vectors, _ = sides(request)
        embeds = base.token_inputs(torch.tensor(request.ids))
        embeds = embeds if vectors is None else torch.cat([vectors, embeds])
        theirs = base.model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds)).long(),
            decoder_input_ids=torch.tensor([base.decoder_start_ids]),
            max_new_tokens=request.sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(base.stop_ids),
        )
        new = tuple(theirs[0, len(base.decoder_start_ids) :].tolist())
        assert answer.ids == (new[:-1] if new[-1] in base.stop_ids else new)


def positions_of(base, count, runner="auto"):
    """Bytes of so many positions of an answer or a text."""
    return count * Engine(base, runner=runner).runners.kv_cache.bytes_per_position


@pytest.mark.parametrize(("runner", "num_positions"), [("auto", 400), ("auto", 10_000), ("eager", 10_000)])
@pytest.mark.parametrize("family", each_of(("t5", "bart", "pegasus"), ("t5",)))
def test_a_request_answers_truly_whoever_joins_and_leaves(family, runner, num_positions):
    base, chance, ledger = build(family), random.Random(family), Ledger()
    config = EngineConfig(max_step_tokens=3, max_rows=4, kv_bytes=positions_of(base, num_positions, runner))
    engine = Engine(base, config, runner=runner)
    coming, mine, strangers = mixed(base), {}, []
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


def ask_with_little_memory(base):
    """Three answers that outgrow their slots, and memory for two of them."""
    requests = [asked(base, random_ids(20, seed), 4, 66 + seed, ignore_eos=True) for seed in range(3)]
    engine = Engine(base, EngineConfig(kv_bytes=positions_of(base, 64 * 6)))
    found = answers(base, requests, engine=engine)
    return [is_true(base, *both) for both in zip(requests, found, strict=True)], engine.stats().num_preemptions


def is_true(base, request, answer):
    try:
        assert_true(base, request, answer)
    except AssertionError:
        return False
    return True


def test_a_preempted_answer_goes_on_as_if_it_had_not_been(monkeypatch):
    base = build("t5")
    results, num_preemptions = ask_with_little_memory(base)
    assert results == [True] * 3 and num_preemptions > 0
    monkeypatch.setattr(CapacityBucket, "free", free_without_copying)  # the control: a row moves without its states
    assert ask_with_little_memory(base)[0] != [True] * 3


def test_a_row_that_sees_anothers_text_is_found_out(monkeypatch):
    base = build("bart")
    requests = [asked(base, random_ids(6, seed), 3, 5) for seed in (1, 2)]
    found = answers(base, requests)
    assert [is_true(base, *both) for both in zip(requests, found, strict=True)] == [True, True]
    assert [is_true(base, *both) for both in zip(requests, reversed(found), strict=True)] == [False, False]


def test_an_answer_and_a_text_that_the_memory_never_holds_together_are_refused():
    base = build("t5")
    engine = Engine(base, EngineConfig(kv_bytes=positions_of(base, 64 * 3)))
    assert answers(base, [asked(base, random_ids(60), 2, 50)], engine=engine)
    with pytest.raises(MemoryLimitError, match="raise kv_bytes"):
        engine.add(asked(base, random_ids(100), 2, 100))


def test_choices_of_one_text_are_encoded_once(monkeypatch):
    base = build("t5")
    request = replace(asked(base, random_ids(9, 2), 5, 3, temperature=0.8, ignore_eos=True), num_choices=4)
    encode, lengths = Seq2SeqForward.encode_packed, []

    def counted(forward, embeds_SH, *rest):
        lengths.append(len(embeds_SH))
        return encode(forward, embeds_SH, *rest)

    engine = Engine(base)
    monkeypatch.setattr(Seq2SeqForward, "encode_packed", counted)
    engine.add(request)
    run_out(engine)
    assert lengths == [5 + 9]


def test_streams_of_several_clients_are_the_answers_of_one():
    base = build("t5")
    requests = mixed(base)[:3]

    async def stream(running, request):
        return [event async for event in running.generate(request)]

    async def main():
        async with AsyncEngine(Engine(base)) as running:
            return await asyncio.gather(*(stream(running, request) for request in requests))

    for events, request in zip(asyncio.run(main()), requests, strict=True):
        assert_true(base, request, events[-1].answers[0])


@pytest.mark.skipif(native_library() is None, reason="the C library was not compiled")
def test_int8_answers_are_those_of_a_base_with_the_rounded_weights():
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16}
    base, truth = (build_seq2seq("flan_t5", **sizes) for _ in range(2))
    with torch.no_grad():
        for module in truth.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(quantised(module.weight).dequantised())
    requests = [asked(base, random_ids(5, 1), 3, 8), asked(base, random_ids(7, 2), None, 8)]
    int8 = answers(base, requests, EngineConfig(weights="int8"))
    for mine, theirs, loaded in zip(int8, answers(truth, requests), answers(base, requests), strict=True):
        assert mine.ids == theirs.ids
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
        assert mine.log_probs != pytest.approx(loaded.log_probs, abs=1e-4)


def crowd(base, chance, count):
    """Requests of all kinds: greedy and sampled, short and long, of one to three choices."""
    for _ in range(count):
        prompt = chance.choice([None, 2, 9, both_sides(base, 3, seed=1), both_sides(base, 5, seed=2)])
        request = asked(
            base,
            random_ids(chance.randint(1, 60), chance.randint(0, 99)),
            prompt,
            chance.choice([1, 5, 30, 80]),
            temperature=chance.choice([0.0, 0.8]),
            top_k=chance.choice([0, 5]),
            repetition_penalty=chance.choice([1.0, 1.3]),
            stop=chance.choice([(), ("w5",)]),
            ignore_eos=chance.random() < 0.7,
            seed=chance.randint(0, 3),
        )
        yield replace(request, num_choices=chance.choice([1, 1, 3]), timeout_s=chance.choice([None, None, None, 1.0]))


@pytest.mark.parametrize("family", each_of(("t5", "bart"), ()))
def test_a_crowd_in_little_memory_is_answered_as_each_alone_and_each_ends_once(family):
    base, chance, ledger, now = build(family), random.Random(family), Ledger(), [0.0]
    config = EngineConfig(max_step_tokens=16, max_rows=5, kv_bytes=positions_of(base, 64 * 7))
    engine = Engine(base, config, clock=lambda: now[0])
    coming, admitted = list(crowd(base, chance, 24)), {}
    while coming or engine.has_work:
        if coming and chance.random() < 0.5:
            request = coming.pop()
            admitted[engine.add(request)] = request
        if chance.random() < 0.02 and admitted:
            engine.abort(chance.choice(list(admitted)))
        now[0] += 0.01
        ledger.record(engine.step())
        engine.check_integrity()
    assert_empty(engine)
    assert set(ledger.ends) == set(admitted) and engine.stats().num_preemptions > 0
    finished = {number: end for number, end in ledger.ends.items() if isinstance(end, Finished)}
    assert len(admitted) // 2 < len(finished) < len(admitted)
    for number, end in finished.items():
        for choice, answer in enumerate(end.answers):
            sampling = admitted[number].sampling
            own = replace(sampling, seed=sampling.seed + choice)
            assert_alike(answer, alone(base, replace(admitted[number], num_choices=1, sampling=own)))


def test_choices_that_sample_have_seeds_of_their_own():
    base = build("t5")
    request = replace(asked(base, random_ids(9, 2), 5, 6, temperature=0.8, seed=5), num_choices=3)
    engine = Engine(base)
    numbers = [engine.add(request), engine.add(asked(base, random_ids(7, 3), 3, 5))]
    together = run_out(engine).answers(numbers[0])
    assert len({answer.ids for answer in together}) == 3
    for choice, answer in enumerate(together):
        own = replace(request, num_choices=1, sampling=replace(request.sampling, seed=5 + choice))
        assert_alike(answer, alone(base, own))


def test_penalties_count_what_the_decoder_has_and_not_the_text_as_in_transformers():
    base = build("t5")
    plain = asked(base, (*random_ids(9, 2), 2), None, 10, ignore_eos=True)
    request = replace(plain, sampling=replace(plain.sampling, repetition_penalty=3.0))
    theirs = base.model.generate(
        torch.tensor([request.ids]), max_new_tokens=10, do_sample=False, repetition_penalty=3.0, eos_token_id=[VOCAB]
    )
    ours, without = answers(base, [request, plain])
    assert ours.ids == tuple(theirs[0, 1:].tolist()) != without.ids


def test_rules_of_the_generation_settings_are_followed_as_in_transformers():
    model = build_model("bart")
    model.generation_config.update(forced_bos_token_id=7, no_repeat_ngram_size=2, min_length=8, forced_eos_token_id=2)

    base = freeze_base(model, build_tokenizer("<s> $A </s>"))
    for length in (4, 11):
        request = asked(base, (1, *random_ids(length, 2), 2), None, 10)
        (answer,) = answers(base, [request])
        theirs = model.generate(torch.tensor([request.ids]), max_new_tokens=11, do_sample=False)[0].tolist()
        assert theirs[:2] == [2, 7] and theirs[-1] == 2
        assert answer.ids == tuple(theirs[2:-1])


def test_a_text_and_an_answer_are_limited_each_by_itself():
    base = build("bart")
    engine = Engine(base)
    assert answers(base, [asked(base, random_ids(90), 6, num_new=90)], engine=engine)[0].ids
    with pytest.raises(LengthError, match=r"96 tokens.*requested 97 tokens \(91 in the text, 6 in the soft prompt\)"):
        engine.add(asked(base, random_ids(91), 6, num_new=1))
    with pytest.raises(LengthError, match=r"requested 97 tokens \(2 before the answer, 95 in the completion\)"):
        engine.add(asked(base, random_ids(4), 6, num_new=95))


def test_log_probabilities_of_the_text_are_refused_by_name():
    base = build("t5")
    for more in ({"num_text_log_probs": 0}, {"is_text_only": True}):
        with pytest.raises(ConfigError, match="encoder-decoder"):
            Engine(base).add(Request((5, 2), **more))


def test_texts_are_answered_behind_the_end_that_the_tokenizer_adds():
    base = build("t5")
    prompt = SoftPrompt(random_prompt(base, 3))
    (answer,) = generate(base, ["w9 w11 w30"], prompt, SamplingConfig(max_new_tokens=6))
    assert_true(base, Request((9, 11, 30, 2), prompt, SamplingConfig(max_new_tokens=6)), answer)
    assert answer.text == base.decode(answer.ids)


def test_an_engine_counts_what_its_encoder_reads():
    base = build("t5")
    engine = Engine(base)
    number = engine.add(asked(base, random_ids(9), 4, num_new=5, ignore_eos=True))
    end = run_out(engine).ends[number]
    assert isinstance(end, Finished)
    assert (end.num_prompt_tokens, end.num_virtual_tokens, end.num_cached_tokens) == (9, 4, 0)
    assert engine.stats().num_read_tokens == 9 + 4 + 5
