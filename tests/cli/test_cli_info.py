"""softprompt info: the machine, the cache, and the kernels that were measured."""

import pytest
from support.command_line import run, succeed
from support.kernel_tables import own_cache, table_of, write_table
from support.tiny_bases import build_base

from softprompt.base import load_base
from softprompt.families import KernelTable


@pytest.fixture
def cache(monkeypatch, tmp_path):
    return own_cache(monkeypatch, tmp_path / "cache")


def test_it_shows_the_machine_and_what_is_in_the_cache(cache):
    found = succeed("info", "--json").json
    assert found["kernels"] == []
    assert found["cache"] == str(cache.parent)
    assert {"softprompt", "torch", "processor", "threads", "device", "dtype", "compiled_extension"} <= found.keys()
    assert found["free_memory"] > 2**20
    assert "No matrix kernels are measured yet" in succeed("info").out
    write_table(cache, table_of(build_base(), "transposed"))
    assert "1-1024 transposed" in succeed("info").out
    (table,) = succeed("info", "--json").json["kernels"]
    assert KernelTable.from_json(table) == table_of(build_base(), "transposed")


def test_with_a_base_it_measures_once(cache, base_folder):
    where = ("info", "--base", base_folder, "--dtype", "float32")
    first = succeed(*where)
    assert first.err.count("measuring which matrix kernels") == 1
    assert "forward" in first.out and "backward" in first.out
    before = cache.read_text()
    second = succeed(*where)
    assert "measuring" not in second.err
    assert cache.read_text() == before
    again = succeed(*where, "--measure-again")
    assert again.err.count("measuring which matrix kernels") == 1
    assert "measuring" not in succeed("generate", "--base", base_folder, "--dtype", "float32", "w1").err


def test_a_base_with_fixed_kernels_is_not_measured(cache, base_folder):
    found = succeed("info", "--base", base_folder, "--kernels", "fixed")
    assert "measuring" not in found.err
    assert "products follow fixed rules" in found.out
    assert not cache.exists()


def test_a_base_for_which_it_does_not_pay_is_not_measured(base_folder):
    assert load_base(base_folder, dtype="float32").kernels == "measured"
    found = succeed("info", "--base", base_folder, "--dtype", "float32")
    assert "measuring" not in found.err and "too small" in found.out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--measure-again",), "--measure-again is for the products of one base; give --base"),
        (("--measure-again", "--base", "embedded", "--kernels", "fixed"), "--kernels is 'fixed'"),
        (("--kernels", "quick"), "quick"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, sentence):
    found = run("info", *flags)
    assert found.code == 2
    assert sentence in found.err
