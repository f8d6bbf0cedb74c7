"""`softprompt train` in several processes for real: one prompt, one voice, one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ENVIRONMENT, Ran, run_apart, succeed
from support.material import QUICK, TEMPLATE, review, save_base, sentence, write_csv, write_jsonl

from softprompt.runs import RunFolder
from softprompt.storage import load_prompt

ACCELERATE = Path(__file__).parents[1] / "launch" / "accelerate_on_loopback.py"
TWO = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0)
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = tmp_path_factory.mktemp("launch")
    base = save_base(place / "tiny-llama")
    data = write_csv(place / "texts.csv", [{"prompt": sentence(i)} for i in range(30)])
    return (
        "train", "--base", base, "--data", data, "--text-column", "prompt", "--virtual-tokens", 3, "--epochs", 2,
        "--dtype", "float32", "--device", "cpu", "--rows", 19, "--validation", 5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """One process's run and what it printed."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, succeed(*flags, "--out", out, "--json").json


def accelerate(*arguments):
    """`accelerate launch ARGUMENTS`."""
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no")
    command = [sys.executable, ACCELERATE, *plain, *arguments]
    environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=200)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def difference(one, other):
    found, wanted = load_prompt(one).tensor, load_prompt(other).tensor
    return float((found - wanted).norm() / wanted.norm())


def assert_as_alone(ran, out, alone):
    assert ran.code == 0, ran.err
    place, one = alone
    assert "2 processes share the rows of a step" in ran.err
    assert difference(out, place) < 1e-4
    assert ran.json["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert dict(ran.json["validation_losses"]) == pytest.approx(dict(one["validation_losses"]), rel=1e-3)
    assert ran.err.count("kept step") == 1
    assert len(RunFolder(out).read_metrics()) == len(RunFolder(place).read_metrics())


def test_the_control_another_seed_is_another_prompt(flags, alone, tmp_path):
    succeed(*flags, "--seed", 1, "--out", tmp_path / "other")
    assert difference(tmp_path / "other", alone[0]) > 0.1


def test_two_processes_make_the_prompt_that_one_makes(flags, alone, tmp_path):
    ran = run_apart(*flags, "--processes", 2, "--out", tmp_path / "two", "--json")
    assert_as_alone(ran, tmp_path / "two", alone)


def test_two_processes_say_whether_the_prompt_helps(flags, tmp_path):
    """One of them judges, with the whole base, as a single process does."""
    data = write_jsonl(tmp_path / "reviews.jsonl", [review(i) for i in range(44)])
    labelled = ("train", "--base", flags[2], *QUICK, "--device", "cpu", "--data", data, *TEMPLATE)
    alone = succeed(*labelled, "--out", tmp_path / "alone")
    ran = run_apart(*labelled, "--processes", 2, "--out", tmp_path / "two")
    assert ran.code == 0, ran.err
    assert ran.out == alone.out
    assert ran.out.startswith("On 20 validation rows the prompt is right in ")


@pytest.mark.slow
def test_two_processes_of_accelerate_make_it_too(flags, alone, tmp_path):
    ran = accelerate(*TWO, "-m", "softprompt", *flags, "--out", tmp_path / "two", "--json")
    assert_as_alone(ran, tmp_path / "two", alone)


@pytest.mark.slow
def test_one_process_of_accelerate_is_one_process_to_the_bit(flags, alone, tmp_path):
    ran = accelerate("--cpu", "-m", "softprompt", *flags, "--out", tmp_path / "one", "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {**alone[1], "out": str(tmp_path / "one")}


@pytest.mark.slow
def test_a_refusal_is_said_once(flags, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    said = run_apart(*flags, "--processes", 2, "--out", tmp_path / "thesis")
    assert said.complaint.startswith(f"{tmp_path / 'thesis'} exists")
