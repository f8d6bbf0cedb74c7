"""What goes wrong with one request, or in one step, ends those that it concerns with a sentence, and nobody else."""

from dataclasses import replace

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
from support.tiny_bases import EOS, VOCAB, build_base, build_model, build_tokenizer, random_ids, random_prompt

from softprompt.base import freeze_base
from softprompt.config import EngineConfig
from softprompt.engine import Engine, Failed, Finished, Request
from softprompt.engine.model_runner import BatchedRunner
from softprompt.errors import BaseModelError
from softprompt.families import KVBuffer
from softprompt.prompt import SoftPrompt

OVERFLOWING = ["bloom", "gptj", "gpt2", "gpt_neox", "opt", "phi", "falcon", "gpt_neo", "mpt"]  # by their layer norms


def overflowing_prompt(base, length=5):
    """Finite numbers whose squares are not."""
    values = random_prompt(base, length)
    return SoftPrompt(torch.where(torch.arange(length)[:, None] > 0, 3e38 * values.sign(), values))


@pytest.mark.parametrize("runner", ["auto", "torch"])
@pytest.mark.parametrize("family", OVERFLOWING)
def test_a_prompt_that_overflows_fails_alone(family, runner):
    """It once left its NaN in memory: 0 times NaN is NaN, and whoever took its place failed too."""
    base = build_base(family)
    neighbours = [asked(base, random_ids(5, seed), length) for seed, length in enumerate((None, 4, 9))]
    engine, ledger = Engine(base, runner=runner), Ledger()
    bad = engine.add(Request(random_ids(20), overflowing_prompt(base)))
    numbers = [engine.add(request) for request in neighbours]
    run_out(engine, ledger)
    assert ledger.ends[bad] == Failed(
        bad, f"base 'tiny-{family}' computes NaN in torch.float32; load it in float32 or bfloat16"
    )
    for number, request in zip(numbers, neighbours, strict=True):
        assert_true(base, request, ledger.answers(number)[0])
    for request, answer in zip(neighbours, answers(base, neighbours, engine=engine), strict=True):
        assert_true(base, request, answer)
    assert (engine.stats().num_failed, engine.stats().num_finished) == (1, 6)


def test_a_prompt_that_overflows_and_is_aborted_before_its_first_token_leaves_nothing():
    base = build_base("gpt2")
    engine, ledger = Engine(base, EngineConfig(max_step_tokens=1), runner="torch"), Ledger()
    request = asked(base, random_ids(5), 4)
    first, bad = engine.add(request), engine.add(asked(base, random_ids(60), overflowing_prompt(base)))
    for _ in range(6):
        ledger.record(engine.step())
    engine.abort(bad)
    run_out(engine, ledger)
    assert_true(base, request, ledger.answers(first)[0])
    for answer in answers(base, [request] * 3, engine=engine):
        assert_true(base, request, answer)


def test_all_choices_of_a_request_fail_together_and_once():
    base = build_base("gpt2")
    engine = Engine(base)
    bad = engine.add(replace(asked(base, random_ids(5), overflowing_prompt(base)), num_choices=3))
    assert [type(end) for end in run_out(engine).ends.values()] == [Failed]
    assert engine.stats().num_failed == 1
    assert bad == 0


def test_a_base_that_computes_nan_is_refused_when_it_is_first_used():
    model = build_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(BaseModelError, match="base 'broken' computes NaN"):
        Engine(freeze_base(model, build_tokenizer(), name="broken"))


def test_a_base_that_computes_nan_later_fails_every_request_and_can_be_asked_again():
    model = build_model("llama")
    engine = Engine(freeze_base(model, build_tokenizer(), name="broken"))
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    for _ in range(2):
        number = engine.add(Request((5, 6)))
        assert "base 'broken' computes NaN" in run_out(engine).ends[number].why


OUT_OF_MEMORY = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError("no more"),
}


def fail_once(monkeypatch, error, at_call):
    """The runner raises at its nth call, behind the forward: keys and values are written by then."""
    run, calls = BatchedRunner.run, []

    def failing(runner, pieces):
        hidden = run(runner, pieces)
        calls.append(len(pieces))
        if len(calls) == at_call:
            raise error
        return hidden

    monkeypatch.setattr(BatchedRunner, "run", failing)


@pytest.mark.parametrize("at_call", [1, 2, 4])
@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_a_step_without_memory_fails_its_requests_and_the_engine_goes_on(tiny_llama, monkeypatch, where, at_call):
    fail_once(monkeypatch, OUT_OF_MEMORY[where](), at_call)
    requests = [asked(tiny_llama, random_ids(5, seed), 4, ignore_eos=True) for seed in range(5)]
    engine, ledger = Engine(tiny_llama, EngineConfig(max_rows=3)), Ledger()
    numbers = [engine.add(replace(request, num_choices=1 + (seed == 1))) for seed, request in enumerate(requests)]
    run_out(engine, ledger)
    failed = [number for number in numbers if isinstance(ledger.ends[number], Failed)]
    assert failed == numbers[: len(failed)] and 0 < len(failed) < 5
    assert all(ledger.ends[number].why.startswith("out of memory: ") for number in failed)
    for number, request in zip(numbers[len(failed) :], requests[len(failed) :], strict=True):
        assert_true(tiny_llama, request, ledger.answers(number)[0])
    for request, answer in zip(requests, answers(tiny_llama, requests, engine=engine), strict=True):
        assert_true(tiny_llama, request, answer)


def test_an_error_of_ours_is_not_taken_for_a_lack_of_memory(tiny_llama, monkeypatch):
    fail_once(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1)
    engine = Engine(tiny_llama)
    engine.add(asked(tiny_llama, (5, 6)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        engine.step()


@pytest.mark.parametrize("when", [1, 2, 3])
def test_buffers_that_cannot_grow_end_no_other_request(tiny_llama, monkeypatch, when):
    resize, calls = KVBuffer.resize, []

    def failing(store, num_rows):
        calls.append(num_rows)
        if len(calls) == when:
            raise MemoryError("no more")
        resize(store, num_rows)

    monkeypatch.setattr(KVBuffer, "resize", failing)
    engine = Engine(tiny_llama)
    for seed in range(4):
        engine.add(asked(tiny_llama, random_ids(5, seed)))
    ends = run_out(engine).ends
    assert len(ends) == 4 and any(isinstance(end, Finished) for end in ends.values())


def test_closing_drops_all_requests_without_events_and_the_engine_can_be_used_again(tiny_llama):
    """It once failed where rows were running, and stumbled later over those that were being given up."""
    engine = Engine(tiny_llama, EngineConfig(max_rows=3))
    numbers = [engine.add(asked(tiny_llama, random_ids(5, seed), 4)) for seed in range(5)]
    for _ in range(2):
        engine.step()
    engine.abort(numbers[0])
    engine.close()
    assert not engine.has_work
    assert_empty(engine)
    request = asked(tiny_llama, random_ids(5), 4)
    assert_alike(answers(tiny_llama, [request], engine=engine)[0], alone(tiny_llama, request))


def test_settings_that_forbid_every_token_fail_the_request(tiny_llama):
    engine = Engine(tiny_llama)
    nothing = asked(tiny_llama, (5, 6), logit_bias=tuple((token, float("-inf")) for token in range(VOCAB)))
    only_the_end = asked(tiny_llama, (5, 6), logit_bias=tuple((t, float("-inf")) for t in range(VOCAB) if t != EOS))
    numbers = [engine.add(request) for request in (nothing, only_the_end, asked(tiny_llama, (5, 6)))]
    ends = run_out(engine).ends
    assert [type(ends[number]) for number in numbers] == [Failed, Finished, Finished]
    assert ends[numbers[1]].answers[0].ids == ()


def test_few_bytes_are_enough_for_one_row_after_another(tiny_llama):
    requests = [asked(tiny_llama, random_ids(30, seed), 4, 20, ignore_eos=True) for seed in range(3)]
    engine = Engine(tiny_llama, EngineConfig(kv_bytes=kv_bytes(tiny_llama, 64), prefix_bytes=0))
    for request, answer in zip(requests, answers(tiny_llama, requests, engine=engine), strict=True):
        assert_true(tiny_llama, request, answer)
    assert engine.stats().num_preemptions == 0
