"""Which way a base's products go: measured once, read from then on, and checked before it is used."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import count

import pytest
import torch
from support.kernel_tables import own_cache, table_of, write, write_table
from support.tiny_bases import build_base

from softprompt.errors import StorageError
from softprompt.families import KernelTable, forward_of, kernel_table, this_machine
from softprompt.families.frozen_linear import MEASURED_ROWS, WAYS
from softprompt.families.kernel_choice import MEASURING, Product, cached_machines, fastest, measure


@pytest.fixture
def file(monkeypatch, tmp_path):
    return own_cache(monkeypatch, tmp_path / "cache")


@pytest.fixture
def base():
    return build_base("llama", hidden_size=32, intermediate_size=48)


class Said(list):
    """The sentences for the user."""

    def __call__(self, line):
        self.append(line)


def ticks():
    """A clock in which everything takes as long."""
    numbers = count()
    return lambda: next(numbers) * 1e-6


def read(base, **how):
    """The base's table, and what was said."""
    said = Said()
    return kernel_table(base, say=said, clock=ticks(), **how), said


class TestFastest:
    def test_a_way_replaces_torchs_own_where_it_is_clearly_faster(self):
        times = {1: {"linear": 1.0, "transposed": 0.96}, 2: {"linear": 1.0, "transposed": 0.94}}
        assert fastest(times) == ({1: "linear", 2: "transposed"}, {})

    def test_a_copy_is_chosen_apart_for_few_rows_where_it_is_worth_its_memory(self):
        times = {
            4: {"linear": 1.0, "onednn": 0.8, "prepacked": 0.5},
            8: {"linear": 1.0, "onednn": 0.6, "prepacked": 0.6},
        }
        assert fastest(times) == ({4: "onednn", 8: "onednn"}, {4: "prepacked"})
        assert fastest({4: {"linear": 1.0, "onednn": 0.8, "prepacked": 0.7}})[1] == {}

    def test_for_many_rows_the_choice_does_not_depend_on_copies(self):
        """The same bits with a copy and without; a run that has none loses little."""
        assert fastest({256: {"linear": 1.0, "onednn": 1.0, "prepacked": 0.8}}) == ({256: "onednn"}, {})
        assert fastest({256: {"linear": 1.0, "onednn": 1.5, "prepacked": 0.8}}) == ({256: "linear"}, {})

    def test_torchs_own_bfloat16_is_onednns(self):
        assert fastest({4: {"onednn": 1.0, "transposed": 0.97}}) == ({4: "onednn"}, {})


def test_every_product_is_measured_for_every_number_of_rows_and_only_once(base, file):
    table, said = read(base)
    assert said == [MEASURING]
    assert {"forward 32x32 float32", "forward 48x32 float32", "forward 97x32 float32"} <= table.choices.keys()
    assert list(table.choices["forward 48x32 float32"]) == list(MEASURED_ROWS)
    assert all(way in WAYS for ways in table.choices.values() for way in ways.values())
    content = file.read_text()
    assert read(base) == (table, [])
    assert file.read_text() == content


def test_backward_products_are_measured_when_something_is_trained(base, file):
    table, _ = read(base)
    assert not any(name.startswith("backward") for name in table.choices)
    trained, said = read(base, training=True)
    assert said == [MEASURING]
    assert list(trained.choices["backward 48x32 float32"]) == [64, 256, 1_024]
    assert {name: trained.choices[name] for name in table.choices} == table.choices
    assert read(base, training=True) == (trained, [])


def test_what_there_was_no_time_for_follows_the_fixed_rules(base):
    late = count(step=10.0)  # seconds
    product = Product([torch.zeros(8, 8)], MEASURED_ROWS)
    assert measure({"forward 8x8 float32": product}, lambda: next(late)) == {"forward 8x8 float32": {}}


def test_another_number_of_threads_is_measured_anew(base, file, monkeypatch):
    table, _ = read(base)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    other, said = read(base)
    assert said == [MEASURING]
    assert other.machine.differences(table.machine) == "threads was 3, is 1"
    assert {each.machine.threads for each in cached_machines()} == {1, 3}


def test_the_cache_is_used_by_a_bases_forward(base, file):
    write_table(file, table_of(base, "transposed"))
    chosen = forward_of(base).head.kernels.choices
    assert {way for ways in chosen.values() for way in ways.values()} == {"transposed"}


MEASURER = """
import json, sys, time
from itertools import count
from pathlib import Path
from support.tiny_bases import build_base
from softprompt.families import kernel_choice

def wait_for_the_other(line):
    (folder / sys.argv[2]).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)

def clock():
    next(readings)
    return time.perf_counter()

folder, readings = Path(sys.argv[1]), count()
kernel_choice.LEAST_NUMBERS = kernel_choice.LEAST_NUMBERS_OF_BASE = 1
base = build_base("llama", hidden_size=32, intermediate_size=48)
table = kernel_choice.kernel_table(base, say=wait_for_the_other, clock=clock)
print(json.dumps({"readings": next(readings), "table": table.to_json()}))
"""


@pytest.mark.medium
def test_of_two_processes_that_measure_at_once_one_does_and_both_use_its_choices(file, tmp_path):
    """Both find nothing in the cache and begin to measure; their times would differ."""
    (tmp_path / "ready").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [[sys.executable, "-c", MEASURER, tmp_path / "ready", name] for name in "ab"]
    processes = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True, env=environment) for each in commands]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes)
    assert first["table"] == second["table"]
    assert first["table"]["choices"]
    fewest, most = sorted((first["readings"], second["readings"]))
    assert fewest < 5 and most > 100
    (record,) = json.loads(file.read_text())["machines"].values()
    assert record == first["table"]


def test_measuring_again_leaves_other_bases_as_they_are(base, file):
    other = build_base("llama", hidden_size=64)
    write_table(file, KernelTable("measured", this_machine(), {**table_of(other, "transposed").choices}))
    read(base)
    _, said = read(base, again=True)
    assert said == [MEASURING]
    assert read(other)[0].choices == {
        name: ways for name, ways in table_of(other, "transposed").choices.items() if name in read(other)[0].choices
    }


def test_a_small_base_costs_nothing(monkeypatch, tmp_path, base):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    table, said = read(base, training=True)
    assert (table.choices, said) == ({}, [])
    assert not (tmp_path / "cache").exists()


def test_fixed_kernels_neither_read_nor_write_the_cache(base, file):
    write_table(file, table_of(base, "transposed"))
    before = file.read_text()
    table, said = read(dataclasses.replace(base, kernels="fixed"))
    assert (table.kind, table.choices, said) == ("fixed", {}, [])
    assert file.read_text() == before


@pytest.mark.parametrize("place", ["", "a file"])
def test_without_a_cache_that_can_be_written_the_fixed_rules_apply_and_that_is_said(
    base, file, monkeypatch, tmp_path, place
):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "a file" / "cache") if place else "")
    table, said = read(base)
    assert (table.kind, table.choices) == ("fixed", {})
    assert len(said) == 1 and "the cache cannot be written" in said[0]


def changed(**entry):
    return {"forward 32x32 float32": {"1": "linear"}, **entry}


@pytest.mark.parametrize(
    "choices",
    [
        changed(**{"forward 48x32 float32": {"1": "os.system"}}),
        changed(**{"forward 48x32 float32": {"7": "linear"}}),
        changed(**{"forward 48x32 float32": {"1": ["linear"]}}),
        changed(**{"forward 48x32 float32": "linear"}),
        [], None, 7,
    ],
)  # fmt: skip
def test_an_entry_that_is_no_choice_is_measured_again(base, file, choices):
    machine = this_machine()
    record = {**KernelTable("measured", machine, {}).to_json(), "choices": choices}
    write(file, {"machines": {machine.key: record}})
    table, said = read(base)
    assert said == [MEASURING]
    assert list(table.choices["forward 48x32 float32"]) == list(MEASURED_ROWS)
    assert read(base) == (table, [])


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '"text"', '{"machines": 3}', '{"machines": {"x": 1}}', "\x00" * 99]
)
def test_a_broken_file_is_replaced(base, file, content):
    write(file, content)
    assert list(cached_machines()) == []
    table, said = read(base)
    assert said == [MEASURING]
    assert list(cached_machines()) == [table]
    assert json.loads(file.read_text())["machines"].keys() >= {table.machine.key}


def test_a_table_comes_back_from_json(base):
    table = table_of(base, "transposed")
    assert KernelTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: None,
        lambda record: {**record, "machine": 3},
        lambda record: {**record, "choices": {"x": {"1": "eval"}}},
    ],
    ids=["nothing", "no machine", "no way"],
)
def test_a_malformed_record_is_refused_in_a_sentence(base, damage):
    with pytest.raises(StorageError, match="the record of the matrix kernels"):
        KernelTable.from_json(damage(table_of(base, "linear").to_json()))
