"""The main job on real rows and a real, if very small, model: train twice, compare, generate, keep."""

from __future__ import annotations

import json

import pytest
from support.command_line import succeed

COACH = "I want you to act as a motivational coach. "
NICE = "There are two nice things that should matter to you:"


@pytest.mark.slow
def test_the_five_commands(shared_data, tmp_path):
    base = ("--base", shared_data / "models" / "stories260K-llama", "--dtype", "float32")
    learn = ("--virtual-tokens", 4, "--epochs", 6)
    prompts, csv = tmp_path / "prompts", shared_data / "awesome-chatgpt-prompts" / "prompts.csv"
    jsonl = shared_data / "english-quotes" / "quotes.jsonl"
    ran = succeed(
        "train", *base, "--data", csv, "--text-column", "prompt", "--rows", 50, *learn, "--out", prompts / "coach"
    )
    assert "trainable params: 256 || all params: 260,288 || trainable%: 0.0984" in ran.err
    assert "50 of 50 rows used" in ran.err
    assert "42 steps, start data" in ran.err
    ran = succeed(
        "train", *base, "--data", jsonl, "--text-column", "quote", "--rows", 25, *learn, "--out", prompts / "quotes"
    )
    assert "24 steps" in ran.err

    both = ("--prompt", prompts / "coach", "--prompt", prompts / "quotes")
    asked = ("--input", COACH, "--input", NICE, "--max-new-tokens", 50, "--repetition-penalty", 1.5)
    ran = succeed("compare", *base, *both, *asked, "--json", "--markdown", tmp_path / "report.md")
    found = ran.json
    assert [item["input"] for item in found["answered"]] == [COACH, NICE]
    assert all(len(set(item["answers"].values())) == 3 for item in found["answered"])
    losses = {(loss["held_out"], loss["prompt"]): loss for loss in found["losses"]}
    assert losses["quotes.jsonl", None]["num_rows"] == 200
    assert losses["prompts.csv", None]["num_rows"] == 165 - 50
    assert losses["quotes.jsonl", None]["loss"] == pytest.approx(3.07, abs=0.02)
    for held_out, own in (("quotes.jsonl", "quotes"), ("prompts.csv", "coach")):
        ours = losses[held_out, own]
        assert ours["loss"] < losses[held_out, None]["loss"] - 0.1
        assert ours["interval"]["high"] < 0
        assert len(ours["better_rows"]) > 0.8 * ours["num_rows"]
    other = losses["quotes.jsonl", "coach"]["loss"]
    assert losses["quotes.jsonl", "quotes"]["loss"] < other

    answer = succeed(
        "generate", *base, "--prompt", prompts / "quotes", NICE, "--max-new-tokens", 50, "--repetition-penalty", 1.5
    )
    assert answer.out == found["answered"][1]["answers"]["quotes"] + "\n"
    listed = succeed("prompts", "list", "--library", prompts, "--json").json
    assert [(entry["name"], entry["problem"]) for entry in listed] == [("coach", None), ("quotes", None)]
    succeed("prompts", "check", "--library", prompts, *base)
    shown = succeed("prompts", "show", "quotes", "--library", prompts, *base, "--json").json
    assert len(shown["nearest"]) == 4
    print(json.dumps({name: loss["loss"] for name, loss in ((str(key), value) for key, value in losses.items())}))


@pytest.mark.medium
def test_foreign_weights_without_a_config_say_what_is_missing(shared_data, tmp_path):
    from support.command_line import run

    folder = shared_data / "adapters" / "tinyllama-8x64"
    fixed = ("prompts", "import", folder, "theirs", "--library", tmp_path / "library")
    assert "adapter_config.json" in run(*fixed).complaint
    assert not (tmp_path / "library").exists()
    succeed(*fixed, "--task-type", "CAUSAL_LM")
    succeed(
        "prompts", "check", "--library", tmp_path / "library", "--base", shared_data / "models" / "stories260K-llama"
    )
