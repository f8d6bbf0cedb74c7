"""`softprompt train --processes N` for real: one prompt, one voice, one folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from command_line import run, run_apart
from material import save_base, sentence, write_csv

from softprompt.storage import RunFolder, load_prompt


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = tmp_path_factory.mktemp("launch")
    base = save_base(place / "tiny-llama")
    data = write_csv(place / "texts.csv", [{"prompt": sentence(i)} for i in range(30)])
    return (
        "train", "--base", base, "--data", data, "--text-column", "prompt", "--virtual-tokens", 3, "--epochs", 2,
        "--dtype", "float32", "--rows", 19, "--validation", 5,
    )  # fmt: skip


@pytest.mark.medium
def test_two_processes_make_the_prompt_that_one_makes(flags, tmp_path):
    two = run_apart(*flags, "--processes", 2, "--out", tmp_path / "two", "--json")
    assert two.code == 0, two.err
    one = run(*flags, "--out", tmp_path / "one", "--json")
    found, wanted = load_prompt(tmp_path / "two").tensor, load_prompt(tmp_path / "one").tensor
    assert (found - wanted).norm() / wanted.norm() < 1e-3
    assert two.json["losses"] == pytest.approx(one.json["losses"], rel=1e-4)
    assert dict(two.json["validation_losses"]) == pytest.approx(dict(one.json["validation_losses"]), rel=1e-3)
    assert two.err.count("kept step") == 1
    assert len(RunFolder(tmp_path / "two").read_metrics()) == len(RunFolder(tmp_path / "one").read_metrics())
    assert not torch.equal(wanted, torch.zeros_like(wanted))


@pytest.mark.medium
def test_a_refusal_is_said_once(flags, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    said = run_apart(*flags, "--processes", 2, "--out", tmp_path / "thesis")
    assert said.complaint.startswith(f"{tmp_path / 'thesis'} exists")
