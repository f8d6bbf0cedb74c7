"""One thread owns the engine; coroutines of any loop get its events, and none of them is left waiting."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from contextlib import aclosing, suppress

import pytest
from support.echo_engine import Echo
from support.tiny_bases import random_ids, random_prompt

from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import generate
from softprompt.engine.async_engine import AsyncEngine
from softprompt.engine.engine import Engine
from softprompt.engine.request import Aborted, Answer, Failed, Finished, Request, Tokens
from softprompt.errors import DataError, EngineError, LengthError, QueueFullError, SoftpromptError
from softprompt.prompt import SoftPrompt

ENDLESS = range(10**12)  # ids of a request that does not end by itself


def run(main):
    """In a new event loop, from which no task and no thread may be left."""

    async def checked():
        await main()
        assert len(asyncio.all_tasks()) == 1

    before = threading.active_count()
    asyncio.run(checked())
    assert threading.active_count() <= before


async def until(holds):
    end = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


async def listen(engine, request):
    return [event async for event in engine.generate(request)]


def echoed(events):
    return tuple(token for event in events[:-1] for token in event.ids)


def test_a_request_is_answered_by_its_tokens_and_one_end():
    async def main():
        async with AsyncEngine(Echo()) as engine:
            *tokens, end = await listen(engine, Request((5, 6, 7)))
        assert tokens == [Tokens(0, 0, (token,), "") for token in (5, 6, 7)]
        assert end == Finished(0, (Answer((), "", "stop"),), 0, 0)

    run(main)


def test_on_admitted_is_called_before_the_first_event():
    async def main():
        told = []
        async with AsyncEngine(Echo(max_running=1)) as engine:
            async for event in engine.generate(Request((5,)), lambda: told.append("admitted")):
                told.append(type(event).__name__)
            assert told == ["admitted", "Tokens", "Finished"]
            with pytest.raises(DataError):
                await anext(engine.generate(Request(()), lambda: told.append("never")))
        assert "never" not in told

    run(main)


def test_many_at_once_each_get_their_own():
    requests = [Request(tuple(range(number, number + number % 13 + 1))) for number in range(500)]
    echo = Echo()

    async def main():
        async with AsyncEngine(echo) as engine:
            answers = await asyncio.gather(*(listen(engine, request) for request in requests))
        assert [echoed(events) for events in answers] == [request.ids for request in requests]
        assert all(isinstance(events[-1], Finished) for events in answers)

    run(main)
    assert echo.is_closed and not echo.running


async def listen_to_all(engine, requests):
    return [pair async for pair in engine.generate_all(requests)]


def test_requests_of_one_list_are_each_answered_under_their_index():
    requests = [Request((5, 6)), Request((7,)), Request(()), Request((8, 9, 10))]

    async def main():
        async with AsyncEngine(Echo()) as engine:
            pairs = await listen_to_all(engine, [each for each in requests if each.ids])
            for index, request in enumerate(each for each in requests if each.ids):
                events = [event for number, event in pairs if number == index]
                assert echoed(events) == request.ids and isinstance(events[-1], Finished)
            assert await listen_to_all(engine, []) == []

    run(main)


def test_a_list_with_one_refused_request_is_admitted_as_a_whole_or_not_at_all():
    echo = Echo(max_running=2)

    async def main():
        async with AsyncEngine(echo) as engine:
            with pytest.raises(DataError, match="an empty text"):
                await listen_to_all(engine, [Request(ENDLESS), Request(())])
            await until(lambda: len(echo.done) == 1)
            with pytest.raises(QueueFullError):
                await listen_to_all(engine, [Request(ENDLESS)] * 3)
            await until(lambda: len(echo.done) == 3)
        assert all(isinstance(end, Aborted) for end in echo.done.values())

    run(main)


def test_closing_the_answers_to_a_list_aborts_those_that_have_not_ended():
    echo = Echo()

    async def main():
        async with AsyncEngine(echo) as engine:
            async with aclosing(engine.generate_all([Request((1,)), Request(ENDLESS), Request(ENDLESS)])) as events:
                async for index, event in events:
                    if index == 0 and isinstance(event, Finished):
                        break
            await until(lambda: len(echo.done) == 3)
        assert [type(echo.done[number]) for number in range(3)] == [Finished, Aborted, Aborted]

    run(main)


def test_only_the_worker_touches_the_engine():
    echo = Echo()

    async def main():
        async with AsyncEngine(echo) as engine:
            await _is_cancelled(engine, echo)
            await listen(engine, Request((1,)))
            await engine.abort(0)
            assert 0 < await engine.stats() <= echo.num_steps
        with pytest.raises(EngineError):
            await listen(engine, Request((1,)))

    run(main)
    (worker,) = echo.threads
    assert worker is not threading.current_thread() and not worker.is_alive()


def test_a_refused_request_raises_where_it_was_asked_for():
    async def main():
        async with AsyncEngine(Echo(max_running=1)) as engine, aclosing(engine.generate(Request(ENDLESS))) as first:
            await anext(first)
            with pytest.raises(DataError, match="an empty text"):
                await listen(engine, Request(()))
            with pytest.raises(QueueFullError):
                await listen(engine, Request((1,)))
            assert isinstance(await anext(first), Tokens)

    run(main)


async def _breaks(engine, echo):
    async for _ in engine.generate(Request(ENDLESS)):
        break


async def _closes(engine, echo):
    async with aclosing(engine.generate(Request(ENDLESS))) as events:
        await anext(events)


async def _is_cancelled(engine, echo):
    task = asyncio.create_task(listen(engine, Request(ENDLESS)))
    await until(lambda: echo.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _fails(engine, echo):
    with suppress(ZeroDivisionError):
        async with aclosing(engine.generate(Request(ENDLESS))) as events:
            async for _ in events:
                raise ZeroDivisionError


async def _runs_out_of_time(engine, echo):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(listen(engine, Request(ENDLESS)), 0.3)


@pytest.mark.parametrize("stops", [_breaks, _closes, _is_cancelled, _fails, _runs_out_of_time])
def test_a_consumer_that_stops_aborts_its_request(stops):
    echo = Echo()

    async def main():
        async with AsyncEngine(echo) as engine:
            await stops(engine, echo)
            gc.collect()
            await until(lambda: 0 in echo.done)
            assert echo.done == {0: Aborted(0, "asked")}
            assert echoed(await listen(engine, Request((7, 8)))) == (7, 8)

    run(main)


@pytest.mark.parametrize("is_behind_another", [False, True])
def test_a_task_that_is_cancelled_while_its_request_is_admitted(is_behind_another):
    """In the middle of `add` it must be aborted behind it; before it, it is never added."""
    echo = Echo()
    echo.may_add.clear()

    async def main():
        async with AsyncEngine(echo) as engine:
            others = [asyncio.create_task(listen(engine, Request((1,))))] if is_behind_another else []
            await asyncio.sleep(0)
            task = asyncio.create_task(listen(engine, Request(ENDLESS)))
            await until(echo.is_adding.is_set)
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0.01)
            echo.may_add.set()
            await asyncio.gather(*others)
            await until(lambda: not echo.running)
        assert task.cancelled()
        assert [type(end) for end in echo.done.values()] == [Finished if is_behind_another else Aborted]

    run(main)


def test_abort_ends_one_request_and_no_other():
    async def main():
        async with AsyncEngine(Echo()) as engine, aclosing(engine.generate(Request(ENDLESS))) as events:
            other = asyncio.create_task(listen(engine, Request(tuple(range(200)))))
            first = await anext(events)
            await engine.abort(first.request)
            await engine.abort(first.request)
            await engine.abort(77)
            rest = [event async for event in events]
            assert rest[-1] == Aborted(first.request, "asked")
            assert all(isinstance(event, Tokens) for event in rest[:-1])
            assert echoed(await other) == tuple(range(200))
            await engine.abort(first.request)

    run(main)


def test_a_step_that_breaks_ends_everything_with_a_sentence(caplog):
    echo = Echo()

    async def main():
        async with AsyncEngine(echo) as engine:
            tasks = [asyncio.create_task(listen(engine, Request(ENDLESS))) for _ in range(20)]
            await until(lambda: len(echo.running) == 20)
            echo.breaks_with = RuntimeError("out of memory by 3 GB")
            ends = [events[-1] for events in await asyncio.gather(*tasks)]
            why = "the engine has stopped: RuntimeError: out of memory by 3 GB"
            assert sorted(end.request for end in ends) == list(range(20))
            assert all(end == Failed(end.request, why) for end in ends)
            for _ in range(2):
                with pytest.raises(EngineError, match=r"out of memory by 3 GB.*make a new one") as refused:
                    await listen(engine, Request((1,)))
                assert refused.value.__cause__ is echo.breaks_with and isinstance(refused.value, SoftpromptError)
            assert echo.breaks_with.__traceback__ is None, "its frames hold tensors"
            assert await engine.stats() == echo.num_steps
        with pytest.raises(EngineError):
            await listen(engine, Request((1,)))

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "out of memory by 3 GB" in caplog.text and "Traceback" in caplog.text
    assert echo.is_closed


def test_closing_aborts_and_takes_no_more():
    async def main():
        engine = AsyncEngine(Echo())
        engine.start()
        task = asyncio.create_task(listen(engine, Request(ENDLESS)))
        await asyncio.sleep(0.01)
        await asyncio.gather(engine.close(), engine.close())
        assert (await task)[-1] == Aborted(0, "asked")
        await engine.close()
        await engine.abort(0)
        with pytest.raises(EngineError, match="not running"):
            await listen(engine, Request((1,)))
        with pytest.raises(EngineError, match="not running"):
            await engine.stats()
        with pytest.raises(EngineError, match="started before"):
            engine.start()

    run(main)


def test_a_draining_close_answers_running_requests_first():
    echo = Echo()

    async def main():
        engine = AsyncEngine(echo)
        engine.start()
        tasks = [asyncio.create_task(listen(engine, Request(tuple(range(300))))) for _ in range(5)]
        await until(lambda: len(echo.running) + len(echo.done) == 5)
        closing = asyncio.create_task(engine.close(drain=True))
        await asyncio.sleep(0)
        with pytest.raises(EngineError):
            await listen(engine, Request((1,)))
        assert [echoed(await task) for task in tasks] == [tuple(range(300))] * 5
        await closing

    run(main)


def test_a_second_close_ends_a_draining_one_at_once():
    echo = Echo()

    async def main():
        engine = AsyncEngine(echo)
        engine.start()
        task = asyncio.create_task(listen(engine, Request(ENDLESS)))
        await until(lambda: echo.running)
        draining = asyncio.create_task(engine.close(drain=True))
        await asyncio.sleep(0.01)
        assert not draining.done()
        await engine.close()
        assert (await task)[-1] == Aborted(0, "asked")
        await draining

    run(main)


def test_a_request_that_comes_with_the_workers_last_breath():
    """Sent before the gate was shut, found behind the last step: it is refused, not forgotten."""
    is_ending, may_end = threading.Event(), threading.Event()

    class Late(AsyncEngine):
        def _end(self):
            is_ending.set()
            assert may_end.wait(100)
            super()._end()

    async def main():
        async with Late(Echo()) as engine:
            closing = asyncio.create_task(engine.close())
            await until(is_ending.is_set)
            late = asyncio.create_task(listen(engine, Request((1,))))
            await asyncio.sleep(0)
            may_end.set()
            with pytest.raises(EngineError, match="being closed"):
                await late
            await closing

    run(main)


def test_an_engine_that_was_never_started_refuses_requests_and_closes():
    async def main():
        engine = AsyncEngine(Echo())
        with pytest.raises(EngineError, match="not running"):
            await listen(engine, Request((1,)))
        await engine.abort(0)
        await engine.close()

    run(main)


def test_several_event_loops_share_one():
    echo = Echo()
    engine = AsyncEngine(echo)
    engine.start()
    found = {}

    async def ask(number):
        requests = [Request(tuple(range(number, number + length))) for length in range(1, 40)]
        found[number] = [echoed(events) for events in await asyncio.gather(*(listen(engine, r) for r in requests))]

    threads = [threading.Thread(target=asyncio.run, args=[ask(number)]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    run(engine.close)
    assert found == {number: [tuple(range(number, number + length)) for length in range(1, 40)] for number in range(4)}
    assert len(echo.threads) == 1


def test_a_loop_that_was_closed_gives_its_requests_up():
    echo = Echo()
    engine = AsyncEngine(echo)
    engine.start()
    loop = asyncio.new_event_loop()
    events = engine.generate(Request(ENDLESS))
    loop.run_until_complete(anext(events))
    loop.close()
    run(lambda: until(lambda: 0 in echo.done))
    run(engine.close)
    assert echo.done == {0: Aborted(0, "asked")}


def test_a_loop_is_woken_once_per_step(monkeypatch):
    """Not once per event: with hundreds of answers that would be most of the work."""
    echo = Echo()

    async def main():
        wakes = []
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (wakes.append(call), wake(*call))[1])
        async with AsyncEngine(echo) as engine:
            echo.may_add.clear()
            tasks = [asyncio.create_task(listen(engine, Request(tuple(range(50))))) for _ in range(20)]
            await until(echo.is_adding.is_set)
            echo.may_add.set()
            await asyncio.gather(*tasks)
        batches = [call for call in wakes if isinstance(call[-1], list)]
        assert len(batches) == echo.num_steps < 100
        assert sum(len(batch) for _, batch in batches) == 20 * 51

    run(main)


def test_an_idle_engine_sleeps():
    echo = Echo()

    async def main():
        async with AsyncEngine(echo) as engine:
            await listen(engine, Request((1,)))
            await asyncio.sleep(0.02)
            before = echo.num_asked
            await asyncio.sleep(0.1)
            assert echo.num_asked <= before + 2
            assert echo.num_steps == 2

    run(main)


def test_commands_are_taken_between_steps():
    async def main():
        async with AsyncEngine(Echo()) as engine, aclosing(engine.generate(Request(ENDLESS))) as events:
            await anext(events)
            seen = [await engine.stats() for _ in range(20)]
            assert seen == sorted(seen)
            assert await listen(engine, Request((1,)))

    run(main)


def test_a_worker_that_dies_ends_every_request(monkeypatch):
    """A bug outside of `step`: the thread ends with its traceback, and the listeners with an event."""
    died = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: died.append(arguments.exc_value))

    class Broken(Echo):
        @property
        def has_work(self):
            if self.num_steps == 3:
                raise ZeroDivisionError
            return super().has_work

    async def main():
        async with AsyncEngine(Broken()) as engine:
            assert isinstance((await listen(engine, Request(ENDLESS)))[-1], Failed)
            with pytest.raises(EngineError):
                await listen(engine, Request((1,)))

    run(main)
    assert [type(error) for error in died] == [ZeroDivisionError]


@pytest.mark.parametrize("max_rows", [2, 32])
def test_the_real_engine_answers_as_generate_does(tiny_llama, max_rows):
    prompts = [None, *(SoftPrompt(random_prompt(tiny_llama, length, seed=length)) for length in (2, 5))]
    requests = [
        Request(random_ids(3 + number % 7, number), prompts[number % 3], SamplingConfig(max_new_tokens=1 + number % 9))
        for number in range(24)
    ]
    expected = generate(tiny_llama, requests)

    async def main():
        async with AsyncEngine(Engine(tiny_llama, EngineConfig(max_rows=max_rows))) as engine:
            answered = await asyncio.gather(*(listen(engine, request) for request in requests))
            with pytest.raises(LengthError):
                await listen(engine, Request(random_ids(200)))
            long = SamplingConfig(max_new_tokens=80, ignore_eos=True)
            async with aclosing(engine.generate(Request(random_ids(3), sampling=long))) as events:
                await anext(events)
            while (stats := await engine.stats()).num_running + stats.num_waiting:
                await asyncio.sleep(0.001)
        for events, answer in zip(answered, expected, strict=True):
            *tokens, end = events
            assert end.answers[0].ids == answer.ids
            assert "".join(event.text for event in tokens) == end.answers[0].text == answer.text
        assert (stats.num_finished, stats.num_aborted) == (len(requests), 1)

    run(main)
