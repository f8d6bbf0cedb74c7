"""Who runs next: clients in turn, priorities, deadlines, limits; and nobody who answers stands still."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_runs import Ledger, alone, asked, assert_alike, assert_true, kv_bytes, run_out
from support.tiny_bases import build_base, random_ids

from softprompt.config import EngineConfig
from softprompt.engine import Aborted, Engine, Finished, Tokens
from softprompt.engine.scheduler import FairQueue
from softprompt.errors import MemoryLimitError, QueueFullError


def served(engine):
    """Tokens that each client was served so far, as the queue counts them."""
    return Counter(engine.scheduler.waiting.service)


def of(client, base, seed=0, length=8, num_new=8, **more):
    return replace(asked(base, random_ids(length, seed), None, num_new, ignore_eos=True), client=client, **more)


def test_a_client_with_many_requests_does_not_delay_others(tiny_llama):
    """One client's sixty requests are there first; another's six, from then on, are served turn by turn."""
    engine, ledger = Engine(tiny_llama, EngineConfig(max_rows=4)), Ledger()
    flood = [engine.add(of("flood", tiny_llama, seed)) for seed in range(60)]
    for _ in range(20):
        ledger.record(engine.step())
    others, before = [engine.add(of("other", tiny_llama, seed)) for seed in range(6)], served(engine)
    num_before = sum(number in ledger.ends for number in flood)
    while not all(number in ledger.ends for number in others):
        ledger.record(engine.step())
    num_meanwhile = sum(number in ledger.ends for number in flood) - num_before
    assert num_meanwhile <= 6 + 2 * 4  # as many, and what was running at the start and is at the end
    one = 8 + 7 + 2 * 8  # a request: 8 read, 8 chosen, 7 of them run
    assert served(engine)["flood"] - before["flood"] <= (6 + 4) * one
    run_out(engine, ledger)


@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_clients_with_work_are_served_alike_to_within_the_rows_that_run(tiny_llama, max_rows):
    """However unlike their requests are: the bound is what may run at once, as Sheng et al. prove for their counter."""
    chance, engine = random.Random(max_rows), Engine(tiny_llama, EngineConfig(max_rows=max_rows, max_step_tokens=16))
    for number in range(36):
        length, num_new = chance.choice([(30, 2), (3, 20), (10, 10)])
        engine.add(of("abc"[number % 3], tiny_llama, number, length, num_new))
    largest = 30 + 2 * 2 + 3 + 20 + 2 * 20
    while {row.request.client for row in engine.scheduler.waiting} == set("abc"):
        engine.step()
        own = [served(engine)[client] for client in "abc"]
        assert max(own) - min(own) <= largest * (max_rows + 1)
    engine.close()


def test_a_client_without_requests_saves_up_no_claim(tiny_llama):
    engine, ledger = Engine(tiny_llama, EngineConfig(max_rows=1)), Ledger()
    engine.add(of("away", tiny_llama))
    for seed in range(12):
        engine.add(of("busy", tiny_llama, seed))
    while sum(isinstance(end, Finished) for end in ledger.ends.values()) < 7:
        ledger.record(engine.step())
    back = [engine.add(of("away", tiny_llama, seed)) for seed in range(4)]
    order = [number for number in run_out(engine, ledger).ends if number in back]
    behind = list(ledger.ends)[7:]
    assert order == back
    assert set(behind[:4]) != set(back), "it had all of its turns at once"
    assert set(behind[:8]) > set(back)


def test_lower_priorities_go_first_whoever_asks(tiny_llama):
    engine = Engine(tiny_llama, EngineConfig(max_rows=1))
    commands = [("a", 1), ("a", 0), ("b", 2), ("b", -1), ("c", 0), ("a", -1)]
    numbers = [engine.add(of(client, tiny_llama, num_new=2, priority=priority)) for client, priority in commands]
    ended = [commands[numbers.index(number)][1] for number in run_out(engine).ends]
    assert ended == sorted(ended)


def test_without_clients_the_first_to_come_is_the_first_served(tiny_llama):
    engine = Engine(tiny_llama, EngineConfig(max_rows=2))
    numbers = [engine.add(of(None, tiny_llama, seed)) for seed in range(9)]
    assert list(run_out(engine).ends) == numbers


def test_a_waiting_request_can_be_aborted(tiny_llama):
    engine = Engine(tiny_llama, EngineConfig(max_rows=1))
    first, second, third = (engine.add(of("a", tiny_llama, seed)) for seed in range(3))
    ledger = Ledger()
    ledger.record(engine.step())
    engine.abort(second)
    ends = run_out(engine, ledger).ends
    assert ends[second] == Aborted(second, "asked")
    assert isinstance(ends[first], Finished) and isinstance(ends[third], Finished)
    engine.abort(second)
    engine.abort(10**6)
    assert engine.step() == []


def test_deadlines_hold_while_waiting_and_while_running(tiny_llama):
    now = [100.0]
    engine = Engine(tiny_llama, EngineConfig(max_rows=1), clock=lambda: now[0])
    running, waiting, patient = (
        engine.add(of(None, tiny_llama, seed, timeout_s=timeout)) for seed, timeout in enumerate((5.0, 3.0, None))
    )
    ledger = Ledger()
    for _ in range(3):
        ledger.record(engine.step())
    now[0] = 103.0
    ledger.record(engine.step())
    assert ledger.ends == {waiting: Aborted(waiting, "deadline")}
    now[0] = 105.0
    ledger.record(engine.step())
    assert ledger.ends[running] == Aborted(running, "deadline")
    assert isinstance(run_out(engine, ledger).ends[patient], Finished)
    assert engine.stats().num_aborted == 2


def test_more_than_may_wait_are_refused_and_can_come_again(tiny_llama):
    engine, ledger = Engine(tiny_llama, EngineConfig(max_rows=1, max_waiting=2)), Ledger()
    engine.add(of(None, tiny_llama))
    ledger.record(engine.step())
    engine.add(of(None, tiny_llama))
    engine.add(of(None, tiny_llama))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.add(of(None, tiny_llama))
    engine.check_integrity()
    while engine.stats().num_waiting == 2:
        ledger.record(engine.step())
    engine.add(of(None, tiny_llama))
    assert len(run_out(engine, ledger).ends) == 4


def test_a_row_that_the_memory_can_never_hold_is_refused(tiny_llama):
    engine = Engine(tiny_llama, EngineConfig(kv_bytes=kv_bytes(tiny_llama, 64)))
    with pytest.raises(MemoryLimitError, match=r"65 positions are more than the engine's memory.*raise kv_bytes"):
        engine.add(of(None, tiny_llama, length=50, num_new=15))
    assert not engine.has_work
    engine.add(of(None, tiny_llama, length=50, num_new=14))
    assert len(run_out(engine).ends) == 1


@pytest.mark.parametrize("max_step_tokens", [1, 4, 16])
def test_whoever_answers_gets_a_token_every_step_while_long_texts_are_read(tiny_llama, max_step_tokens):
    engine = Engine(tiny_llama, EngineConfig(max_step_tokens=max_step_tokens))
    answering = [engine.add(of(None, tiny_llama, seed, 1, 40)) for seed in range(2)]
    while engine.stats().num_new_tokens < 2:
        engine.step()
    for seed in range(3):
        engine.add(of(None, tiny_llama, seed, 80, 2))
    for _ in range(20):
        before = engine.stats().num_read_tokens
        events = engine.step()
        told = [event.request for event in events if isinstance(event, Tokens)]
        assert set(answering) <= set(told)
        assert engine.stats().num_read_tokens - before <= len(told) + max_step_tokens
    engine.close()


@pytest.mark.parametrize(
    ("num_answering", "length", "most", "num_steps"),
    [(4, 12, 12, 1), (4, 40, 12, 4), (20, 40, 20, 2), (4, 320, 40, 8), (4, 1_000, 64, 16)],
)
def test_beside_answers_a_text_is_read_over_a_few_steps(num_answering, length, most, num_steps):
    """Up to sixteen positions in all, as many as rows answer, or an eighth of the text: no step is much longer."""
    base = build_base("llama", max_position_embeddings=1_100)
    engine = Engine(base, EngineConfig(max_rows=num_answering + 1, prefix_bytes=0))
    answering = [engine.add(of(None, base, seed, 1, 40)) for seed in range(num_answering)]
    while engine.stats().num_new_tokens < num_answering:
        engine.step()
    engine.add(of(None, base, 5, length, 2))
    read = []
    while sum(read) < length:
        before = engine.stats().num_read_tokens
        told = {event.request for event in engine.step() if isinstance(event, Tokens)}
        assert told >= set(answering)
        read.append(engine.stats().num_read_tokens - before - len(answering))
    assert max(read) == most and len(read) == num_steps
    engine.close()


def test_a_text_is_read_in_one_step_where_no_sequence_is_decoding(tiny_llama):
    engine = Engine(tiny_llama)
    engine.add(of(None, tiny_llama, 5, 60, 2))
    engine.step()
    assert engine.stats().num_read_tokens == 60 and engine.stats().num_new_tokens == 1
    engine.close()


def test_a_row_alone_may_outgrow_its_place_though_both_do_not_fit():
    """It once stopped the engine: 64 positions and the next 128 are more than the memory's 130."""
    base = build_base("llama", max_position_embeddings=200)
    request = asked(base, random_ids(10), None, 100, ignore_eos=True)
    engine = Engine(base, EngineConfig(kv_bytes=kv_bytes(base, 130)))
    number = engine.add(request)
    (answer,) = run_out(engine).answers(number)
    assert_true(base, request, answer)
    assert engine.stats().num_preemptions == 1


@pytest.mark.parametrize("clients", [[None], ["a", "b", "c"]], ids=["one_client", "many"])
def test_preempted_sequences_are_not_starved_by_newcomers(tiny_llama, clients):
    """Somebody new comes every other step, for ever; the victim ends all the same, and soon."""
    engine, ledger = Engine(tiny_llama, EngineConfig(kv_bytes=kv_bytes(tiny_llama, 200))), Ledger()
    for seed in range(2):
        engine.add(of("a", tiny_llama, seed, 56, 20))
    request = of("a", tiny_llama, 7, 40, 30)
    victim, seed = engine.add(request), 0
    for step in range(300):
        if step % 2 == 0:
            engine.add(of(clients[seed % len(clients)], tiny_llama, seed, 10, 10))
            seed += 1
        ledger.record(engine.step())
        if victim in ledger.ends:
            break
    assert engine.stats().num_preemptions > 0
    assert step < 200
    assert_alike(ledger.answers(victim)[0], alone(tiny_llama, request))
    engine.close()


class Waiter:
    """All that the queue asks of a row."""

    def __init__(self, number, client, priority):
        self.id, self.client, self.priority = number, client, priority
        self.order = (priority, number, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("apcx"), st.sampled_from("abc"), st.integers(-1, 1), st.integers(0, 30))))
def test_the_fair_queue_pops_in_the_order_of_a_sorted_list(commands):
    """a: add, p: pop and run it, c: charge one that runs, x: one that waits or runs goes."""
    queue, waiting, running, service = FairQueue(), [], [], {}
    for number, (what, client, priority, amount) in enumerate(commands):
        here = {row.client for row in waiting + running}
        if what == "a":
            row = Waiter(number, client, priority)
            if client not in here:
                service[client] = max(service.get(client, 0), min((service[other] for other in here), default=0))
            queue.add(row)
            waiting.append(row)
        elif what == "p" and waiting:
            heads = [min((r for r in waiting if r.client == c), key=order) for c in {r.client for r in waiting}]
            row = min(heads, key=lambda r: (r.priority, service[r.client], r.id))
            assert queue.pop() is row
            waiting.remove(row)
            running.append(row)
        elif what == "c" and running:
            row = running[amount % len(running)]
            queue.charge(row, amount, 1)
            service[row.client] += amount + 2
        elif what == "x" and waiting + running:
            row = (waiting + running)[amount % len(waiting + running)]
            if row in waiting:
                queue.remove(row)
            queue.end(row)
            (waiting if row in waiting else running).remove(row)
            if not waiting + running:
                service.clear()
        assert len(queue) == len(waiting) and set(queue) == set(waiting)
    for row in waiting + running:
        if row in waiting:
            queue.remove(row)
        queue.end(row)
    queue.assert_empty()


def order(row):
    return row.priority, row.id
