"""Pooling requests: their values are those of the library, whatever runs beside them, and each ends exactly once."""

from __future__ import annotations

import asyncio

import pytest
import torch
from support.app_server import words
from support.encoders import build_encoder
from support.engine_runs import Ledger, run_out
from support.tiny_bases import random_ids, random_prompt

from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import Aborted, AsyncEngine, Engine, Failed, Pooled, PoolingRequest, Request, generate
from softprompt.engine.pooling import BARE_EMBEDDING
from softprompt.errors import ConfigError, LengthError, PromptError, QueueFullError
from softprompt.evaluation import label_answers
from softprompt.evaluation.classification import label_rows
from softprompt.families import forward_of
from softprompt.families.task_head import task_head
from softprompt.loss import head_outputs
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row
from softprompt.types import InputForm, PromptRecord

LABELS = (" w5", " w6 w7", " w8")


@pytest.fixture(scope="module")
def prompts(tiny_llama):
    return [SoftPrompt(random_prompt(tiny_llama, length, length)) for length in (1, 3, 6)]


def text(seed, length=6):
    return words(random_ids(length, seed))


def asked(base, prompt, seed, length=6, **more):
    rows = label_rows(base, text(seed, length), LABELS, prompt)
    return PoolingRequest(tuple(rows), length + 1, prompt, **more)


def alone(base, prompt, seed, length=6):
    (answer,) = label_answers(base, [text(seed, length)], LABELS, prompt)
    return list(answer.log_likelihoods.values())


def ends_of(engine, requests):
    ids = [engine.add_pooling(request) for request in requests]
    ledger = run_out(engine)
    return [ledger.ends[number] for number in ids]


def test_texts_under_different_prompts_in_one_forward_have_each_the_values_that_they_have_alone(tiny_llama, prompts):
    cases = [(prompt, seed) for seed in range(4) for prompt in prompts]
    engine = Engine(tiny_llama)
    found = ends_of(engine, [asked(tiny_llama, *case) for case in cases])
    assert engine.stats().num_steps == 1
    for (prompt, seed), end in zip(cases, found, strict=True):
        assert isinstance(end, Pooled)
        assert (end.num_prompt_tokens, end.num_virtual_tokens) == (7, prompt.num_virtual_tokens)
        assert list(end.values) == pytest.approx(alone(tiny_llama, prompt, seed), abs=1e-5)
        for wrong in (alone(tiny_llama, prompt, seed + 1), alone(tiny_llama, prompts[prompt is prompts[0]], seed)):
            assert list(end.values) != pytest.approx(wrong, abs=1e-3)  # the controls


def test_one_text_has_the_librarys_bits(tiny_llama, prompts):
    (end,) = ends_of(Engine(tiny_llama), [asked(tiny_llama, prompts[1], 9)])
    assert list(end.values) == alone(tiny_llama, prompts[1], 9)


def test_rows_of_one_text_may_run_in_several_steps(tiny_llama, prompts):
    engine = Engine(tiny_llama, EngineConfig(max_step_tokens=2))  # 16 positions of a step; a row has 11
    found = ends_of(engine, [asked(tiny_llama, prompts[1], seed) for seed in range(2)])
    assert engine.stats().num_steps == 6
    for seed, end in enumerate(found):
        assert list(end.values) == pytest.approx(alone(tiny_llama, prompts[1], seed), abs=1e-5)


def test_texts_are_classified_beside_answers_that_are_what_they_are_alone(tiny_llama, prompts):
    sampling = SamplingConfig(max_new_tokens=8)
    requests = [Request(tiny_llama.bos_ids + random_ids(5, seed), prompts[seed % 3], sampling) for seed in range(3)]
    engine = Engine(tiny_llama)
    running = [engine.add(request) for request in requests]
    ledger = Ledger()
    ledger.record(engine.step())
    pooling = [engine.add_pooling(asked(tiny_llama, prompts[0], seed)) for seed in range(12)]
    events = engine.step()
    ledger.record(events)
    assert 0 < sum(isinstance(event, Pooled) for event in events) < 12  # a bounded part beside decoding
    assert engine.stats().num_waiting > 0
    ends = run_out(engine, ledger).ends
    assert [ends[number].answers[0].text for number in running] == [
        answer.text for answer in generate(tiny_llama, requests)
    ]
    for seed, number in enumerate(pooling):
        assert list(ends[number].values) == pytest.approx(alone(tiny_llama, prompts[0], seed), abs=1e-5)


def test_clients_take_turns(tiny_llama, prompts):
    engine = Engine(tiny_llama, EngineConfig(max_step_tokens=2))
    many = [engine.add_pooling(asked(tiny_llama, prompts[1], seed, client="many")) for seed in range(20)]
    one = engine.add_pooling(asked(tiny_llama, prompts[1], 5, client="one"))
    urgent = engine.add_pooling(asked(tiny_llama, prompts[1], 6, client="many", priority=-1))
    order = []
    while engine.has_work:
        order += [event.request for event in engine.step()]
    assert order[0] == urgent and order.index(one) <= 2 and order[-1] == many[-1]
    engine.check_integrity()


def test_a_request_is_aborted_at_its_deadline_or_when_asked(tiny_llama, prompts):
    now = [0.0]
    engine = Engine(tiny_llama, EngineConfig(max_step_tokens=1), clock=lambda: now[0])
    late = engine.add_pooling(asked(tiny_llama, prompts[1], 1, timeout_s=5.0))
    given_up = engine.add_pooling(asked(tiny_llama, prompts[1], 2))
    kept = engine.add_pooling(asked(tiny_llama, prompts[1], 3))
    engine.step()
    engine.abort(given_up)
    now[0] = 6.0
    ends = run_out(engine).ends
    assert ends[late] == Aborted(late, "deadline") and ends[given_up] == Aborted(given_up, "asked")
    assert isinstance(ends[kept], Pooled)


def test_the_queue_is_bounded_and_what_cannot_be_read_is_refused(tiny_llama, prompts):
    engine = Engine(tiny_llama, EngineConfig(max_waiting=2))
    for seed in range(2):
        engine.add_pooling(asked(tiny_llama, prompts[0], seed))
    with pytest.raises(QueueFullError):
        engine.add_pooling(asked(tiny_llama, prompts[0], 3))
    with pytest.raises(PromptError, match="width 8"):
        engine.add_pooling(PoolingRequest((Row((1, 2)),), 2, SoftPrompt(torch.ones(2, 8))))
    with pytest.raises(LengthError, match="maximum context length is 96"):
        engine.add_pooling(PoolingRequest((Row((1,) * 97),), 97, prompts[0]))
    engine.close()
    engine.check_integrity()


def test_requests_that_cannot_be_computed_fail_and_the_engine_goes_on(tiny_llama, prompts):
    engine = Engine(tiny_llama)
    broken = PoolingRequest((Row((1, 5), targets=(0, 1), branches=None, num_before=2, columns=(7,)),), 2, prompts[0])
    (end,) = ends_of(engine, [broken])
    assert isinstance(end, Failed)
    (end,) = ends_of(engine, [asked(tiny_llama, prompts[0], 1)])
    assert isinstance(end, Pooled)


def test_a_cancelled_call_aborts_its_requests(tiny_llama, prompts):
    async def go():
        async with AsyncEngine(Engine(tiny_llama, EngineConfig(max_step_tokens=1))) as engine:
            requests = [asked(tiny_llama, prompts[1], seed) for seed in range(30)]
            task = asyncio.create_task(engine.pool(requests))
            while (await engine.stats()).num_waiting < 20:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while (await engine.stats()).num_waiting:
                await asyncio.sleep(0)
            assert (await engine.stats()).num_aborted > 10
            return await engine.pool(requests[:3])

    ends = asyncio.run(go())
    assert [list(end.values) for end in ends] == [
        pytest.approx(alone(tiny_llama, prompts[1], seed), abs=1e-5) for seed in range(3)
    ]


class TestHeads:
    """Rows that a head reads, on an encoder and on a causal base."""

    FORMS = (
        InputForm(kind="template", template="{text}", task="classify", labels=("a", "b", "c"), pooling="cls"),
        InputForm(
            kind="template", template="{text}", task="classify", labels=("x", "y"), pooling="mean",
            placement="after-cls",
        ),
        InputForm(
            kind="template", template="{text} [MASK]", task="cloze", labels=("x", "y"), label_words=(("w9",), ("w8",)),
            placement="after-cls",
        ),
        InputForm(kind="template", template="{text}", task="embed", pooling="mean"),
    )  # fmt: skip

    @pytest.fixture(scope="class")
    def bert(self):
        return build_encoder("bert")

    @pytest.fixture(scope="class")
    def headed(self, bert):
        return [with_head(bert, form, seed) for seed, form in enumerate(self.FORMS)]

    def test_rows_of_several_heads_and_of_none_in_one_forward_have_each_the_values_that_they_have_alone(
        self, bert, headed
    ):
        cases = [(prompt, seed) for seed in range(3) for prompt in [*headed, None]]
        engine = Engine(bert)
        found = ends_of(engine, [PoolingRequest((column_row(bert, *case),), 5, case[0]) for case in cases])
        assert engine.stats().num_steps == 1
        for (prompt, seed), end in zip(cases, found, strict=True):
            values = torch.tensor(end.values)
            if prompt is None:  # the mean of the model's own states, of length 1
                with torch.no_grad():
                    states = bert.model.base_model(torch.tensor([column_row(bert, None, seed).ids]))[0][0]
                expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
            else:
                (expected,) = head_outputs(bert, forward_of(bert), [column_row(bert, prompt, seed)], prompt)
                (wrong,) = head_outputs(bert, forward_of(bert), [column_row(bert, prompt, seed + 1)], prompt)
                assert (values - wrong).abs().max() > 1e-3  # the control
            assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-5)

    def test_a_head_of_a_causal_base_runs_beside_label_likelihood_and_answers(self, tiny_llama, prompts):
        form = InputForm(kind="template", template="{text}", task="classify", labels=("a", "b"), pooling="last")
        prompt = with_head(tiny_llama, form, 4)
        engine = Engine(tiny_llama)
        answer = engine.add(Request((1, 5), prompts[0], SamplingConfig(max_new_tokens=3)))
        row = column_row(tiny_llama, prompt, 1)
        requests = [PoolingRequest((row,), 5, prompt), asked(tiny_llama, prompts[1], 2)]
        numbers = [engine.add_pooling(request) for request in requests]
        ends = run_out(engine).ends
        (expected,) = head_outputs(tiny_llama, forward_of(tiny_llama), [row], prompt)
        assert list(ends[numbers[0]].values) == pytest.approx(expected.tolist(), abs=1e-5)
        assert list(ends[numbers[1]].values) == pytest.approx(alone(tiny_llama, prompts[1], 2), abs=1e-5)
        assert ends[answer].answers

    def test_an_encoder_generates_nothing_and_has_no_int8_weights(self, bert):
        engine = Engine(bert)
        assert "generates nothing" in engine.notes[0]
        with pytest.raises(ConfigError, match="encoder, which generates nothing"):
            engine.add(Request((2, 5, 3)))
        with pytest.raises(ConfigError, match="weights is int8, which is for generation"):
            Engine(bert, EngineConfig(weights="int8"))
        engine.check_integrity()


def with_head(base, form, seed):
    head = task_head(base, form)
    weights = {} if head is None else head.start(seed)
    return SoftPrompt(random_prompt(base, 1 + seed, seed), PromptRecord(form=form), weights)


def column_row(base, prompt, seed):
    """A text's row, read at the columns of the prompt's task."""
    form = BARE_EMBEDDING if prompt is None else prompt.record.form
    text = random_ids(4 + seed, seed)
    text = (*text, base.mask_id) if form.task == "cloze" else text
    ids = (*base.bos_ids, *text, *base.end_ids)
    columns = {"mean": tuple(range(len(ids))), "cls": (0,), "last": (len(ids) - 1,), None: (1 + len(text) - 1,)}
    num_before = len(base.bos_ids) if form.placement == "after-cls" else 0
    return Row(ids, None if prompt is None else 0, num_before=num_before, columns=columns[form.pooling])
