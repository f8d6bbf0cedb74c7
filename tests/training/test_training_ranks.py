"""Which rows are whose: a pure function of sizes and ranks, the same wherever it is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ready import ready_run
from support.tiny_bases import random_ids, random_prompt

from softprompt.config import TrainConfig
from softprompt.errors import ConfigError, MemoryLimitError
from softprompt.families import forward_of
from softprompt.splice import Row
from softprompt.training import Alone, Candidate, StepDone, memory, prepare, train
from softprompt.training.loop import validation_slices
from softprompt.training.ranks import least, most_shared, share
from softprompt.training.step import accumulate_gradient


@dataclass
class Rank:
    """One of several, whose sums are given."""

    rank: int
    count: int
    others: float = 0.0
    num_on_this_machine: int = 1
    in_step: bool = False

    def sum(self, tensors):
        for tensor in tensors:
            tensor += self.others


@given(sizes=st.lists(st.integers(1, 50), max_size=40), count=st.integers(1, 9))
def test_every_row_is_one_ranks_and_they_get_about_as_much(sizes, count):
    shares = [share(range(len(sizes)), sizes, Rank(rank, count)) for rank in range(count)]
    assert sorted(index for mine in shares for index in mine) == list(range(len(sizes)))
    assert all(mine == sorted(mine) for mine in shares)
    lengths = [len(mine) for mine in shares]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == most_shared(len(sizes), Rank(0, count))
    loads = [sum(sizes[index] for index in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_one_rank_has_all():
    assert share("abc", [3, 1, 2], Alone()) == ["a", "b", "c"]
    assert most_shared(7, Alone()) == 7


def test_the_least_value_of_all_ranks():
    assert least(5, Alone()) == 5
    assert least(5, Rank(1, 2, others=3.0)) == 3  # each of two slots, one of them empty, grows by 3


def test_spare_micro_batches_add_nothing_to_the_bit(tiny_llama64):
    rows = [Row(random_ids(2 + index, index), 0, (True,) * (2 + index)) for index in range(5)]
    found = []
    for spare in (0, 3):
        prompt = random_prompt(tiny_llama64, 4).requires_grad_(True)
        slices = accumulate_gradient(
            tiny_llama64, forward_of(tiny_llama64), [prompt], rows, 2, mine=[0, 3, 4], least_batches=2 + spare
        )
        nats = list(slices)
        assert len(nats) == 3 + spare  # and the pass that carries the gradient into the prompt
        found.append((prompt.grad, sum(float(part) for part in nats)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert found[0][1] == found[1][1]


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    cpu = torch.device("cpu")
    assert [memory.free_for(cpu, SimpleNamespace(num_on_this_machine=count)) for count in (1, 2, 4)] == [1000, 500, 250]


def test_where_another_rank_cannot_hold_a_row_all_say_so(tiny_llama, texts):
    with pytest.raises(MemoryLimitError, match="another rank's memory"):
        train(tiny_llama, texts, ranks=Rank(1, 2))  # the other rank adds nothing, so its number of rows is 0


@pytest.fixture
def forwards(tiny_llama64):
    """How often the base has run, forwards and backwards."""
    counts = [0, 0]

    def ran(module, arguments, output):
        counts[0] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.__setitem__(1, counts[1] + 1))

    forward_of(tiny_llama64)
    handle = tiny_llama64.model.model.layers[0].register_forward_hook(ran)
    yield counts
    handle.remove()


@pytest.mark.parametrize("in_step", [False, True])
def test_validation_rows_are_shared_out_and_all_are_counted(tiny_llama64, texts, held_out, forwards, in_step):
    ready = ready_run(tiny_llama64, texts, TrainConfig(virtual_tokens=4), validation=held_out)

    def sums(ranks):
        before = forwards[0]
        slices = validation_slices(tiny_llama64, forward_of(tiny_llama64), ready.loop.trials, ranks)
        return sum(piece.sums_K2 for piece in slices), forwards[0] - before

    whole, _ = sums(Alone())
    parts, numbers = zip(*(sums(Rank(rank, 3, in_step=in_step)) for rank in range(3)), strict=True)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-7, atol=0)
    assert all(0 < float(part[0, 1]) < float(whole[0, 1]) for part in parts)
    assert not in_step or len(set(numbers)) == 1


@pytest.mark.parametrize(("num_rows", "micro_batch_rows"), [(1, 2), (5, 2), (7, 1), (8, 3)])
def test_ranks_in_step_run_as_many_forwards_and_backwards(tiny_llama64, texts, forwards, num_rows, micro_batch_rows):
    config = TrainConfig(virtual_tokens=4, batch_rows=num_rows, micro_batch_rows=micro_batch_rows, max_steps=1)
    ran = []
    for rank in range(3):
        some = Candidate(data=texts[:num_rows], config=config)
        loop = prepare(tiny_llama64, [some], ranks=Rank(rank, 3, in_step=True, others=9.0)).loop
        forwards[:] = [0, 0]
        next(event for event in loop.events() if isinstance(event, StepDone))
        ran.append(tuple(forwards))
    assert len(set(ran)) == 1
    assert ran[0][0] == ran[0][1] > 0


def test_a_base_whose_rows_run_apart_cannot_be_run_in_step(tiny_llama64, texts, monkeypatch):
    apart = replace(forward_of(tiny_llama64), max_batchable_length=5)
    monkeypatch.setattr(import_module("softprompt.training.train"), "forward_of", lambda base: apart)
    with pytest.raises(ConfigError, match="ranks cannot run it in step"):
        train(tiny_llama64, texts, ranks=Rank(0, 2, in_step=True))
