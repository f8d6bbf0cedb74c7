"""The card of a trained adapter: its words run, and it says what the prompt is for and how good it is."""

from __future__ import annotations

import json
import os
import re
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from support.command_line import run, succeed
from support.material import QUICK, TEMPLATE

from softprompt import load_prompt


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def said_by(code: str, folder: Path) -> str:
    """What a snippet prints, run in the adapter's folder as the card says."""
    said, before = StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, {})  # the card is ours
    finally:
        os.chdir(before)
    return said.getvalue()


@pytest.mark.parametrize("name", ["coach", "critic", "helper", "pairs"])
def test_both_snippets_run(prompts, base_folder, name):
    ours, theirs = re.findall(r"```python\n(.*?)```", card_of(prompts / name), re.DOTALL)
    assert f"load_base({str(base_folder)!r})" in ours
    answer = said_by(ours.replace("TEXT", "w7 w8"), prompts / name).strip()
    assert re.fullmatch(r"(w\d+ ?)*", answer), answer
    assert answer or name == "critic"  # which may end at once, when it writes freely
    assert said_by(theirs.replace("TEXT", "w7 w8"), prompts / name).strip()


def test_snippets_of_the_embedded_base_run(texts, tmp_path):
    flags = ("--virtual-tokens", 2, "--max-steps", 1, "--data", texts, "--text-column", "prompt", "--rows", 8)
    succeed("train", "--base", "embedded", *flags, "--out", tmp_path / "p")
    for code in re.findall(r"```python\n(.*?)```", card_of(tmp_path / "p"), re.DOTALL):
        assert said_by(code, tmp_path / "p").strip()


class TestALabelledTraining:
    @pytest.fixture(scope="class")
    def trained(self, base_folder, reviews, tmp_path_factory):
        out = tmp_path_factory.mktemp("labelled") / "critic"
        flags = ("--data", reviews, *TEMPLATE, "--validation", 10)
        return out, succeed("train", "--base", base_folder, *QUICK, *flags, "--out", out, "--json")

    def test_keeps_the_figures_in_result_record_and_card(self, trained):
        out, ran = trained
        found = ran.json["held_out"]
        assert found["rows"] == 10
        assert load_prompt(out).record.run["held_out"] == found
        assert json.loads((out / "run.json").read_text())["result"]["held_out"] == found
        card = card_of(out)
        assert f"- Right {100 * found['accuracy']:.0f} times in 100" in card
        assert "- Validation loss: " in card
        assert "w5 {text} w6" in card
        assert '[" w90", " w91"]' in card

    def test_without_validation_leaves_the_test_rows_to_compare(self, base_folder, reviews, tmp_path):
        flags = ("--data", reviews, *TEMPLATE, "--rows", 24, "--out", tmp_path / "p")
        ran = succeed("train", "--base", base_folder, *QUICK, *flags, "--json")
        assert "note: no validation rows, so the prompt's accuracy is unknown" in ran.err
        assert "times in 100" not in ran.err and "held_out" not in ran.json

    def test_of_a_label_that_training_never_saw_has_no_accuracy_but_an_end(self, base_folder, reviews, tmp_path):
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps({"text": "w7", "label": "w70"}) + "\n")
        flags = ("--data", reviews, *TEMPLATE, "--validation", other, "--out", tmp_path / "p")
        ran = succeed("train", "--base", base_folder, *QUICK, *flags)
        assert "note: no accuracy on the validation set: row 1 of" in ran.err


class TestTheBasesName:
    def test_is_the_folder_that_was_given(self, prompts, base_folder):
        config = json.loads((prompts / "coach" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base_folder)

    def test_is_the_same_in_a_checkpoint(self, prompts, base_folder):
        (config, *_) = sorted((prompts / "coach" / "checkpoints").glob("*/adapter_config.json"))
        assert json.loads(config.read_text())["base_model_name_or_path"] == str(base_folder)

    def test_is_the_base_id_where_one_is_given(self, base_folder, texts, tmp_path):
        flags = ("--data", texts, "--text-column", "prompt", "--rows", 8, "--base-id", "me/llama")
        succeed("train", "--base", base_folder, *QUICK, *flags, "--out", tmp_path / "p")
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "me/llama"
        assert 'base_model: "me/llama"\n' in card_of(tmp_path / "p")
        assert str(base_folder) not in card_of(tmp_path / "p")
        assert load_prompt(tmp_path / "p").record.base_name == "me/llama"

    def test_is_refused_where_it_is_no_hub_id(self, base_folder, texts, untouched):
        flags = ("--data", texts, "--text-column", "prompt", "--base-id", "/a/b/c")
        assert "'/a/b/c' is no Hub id" in run("train", "--base", base_folder, *flags, "--out", untouched).complaint
