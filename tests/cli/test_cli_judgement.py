"""On the embedded base: a training whose prompt does not help ends with that, in words, and one that helps does not."""

from __future__ import annotations

import csv
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from support.command_line import Ran, succeed

from softprompt.config import DataConfig
from softprompt.data import Split, split_rows
from softprompt.data.rows import render_rows, rows_hash
from softprompt.embedded import data_file
from softprompt.runs import RunFolder
from softprompt.storage import load_prompt

REVIEW = "Review: {text}\nSentiment:"
KNOWN_TO_THE_BASE = "{text}\nAll in all, my feeling about it is"
COMPLETION = " {label}"
TRAIN = ("train", "--base", "embedded", "--dtype", "float32")
# Learns the reviews in few steps on this base, whatever the defaults are.
FAST = ("--loss", "tokens", "--relative-learning-rate", 0.3, "--reparameterisation", "residual-mlp", "--averaging", 0)


class Trained(NamedTuple):
    out: Path
    ran: Ran

    @property
    def last_line(self) -> str:
        return self.ran.out.splitlines()[-1]

    @property
    def result(self) -> dict[str, object]:
        return RunFolder(self.out).read_plan()["result"]


def at_random(folder: Path, count: int = 60) -> Path:
    """Reviews of the embedded set with labels that say nothing of them."""
    labels = random.Random(0)
    with open(data_file("reviews.csv"), newline="") as source, open(folder / "random.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        for row, _ in zip(csv.DictReader(source), range(count), strict=False):
            writer.writerow({"text": row["text"], "label": labels.choice(["positive", "negative"])})
    return folder / "random.csv"


def trained(folder: Path, data: Path, template: str, *flags: object) -> Trained:
    form = ("--data", data, "--template", template, "--completion", COMPLETION)
    return Trained(folder / "run", succeed(*TRAIN, *form, *flags, "--out", folder / "run"))


@pytest.fixture(scope="module")
def helpful(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("helpful")
    return trained(place, data_file("reviews.csv"), REVIEW, *FAST, "--rows", 120, "--epochs", 4)


@pytest.fixture(scope="module")
def useless(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("useless")
    return trained(place, at_random(place), REVIEW, "--epochs", 1)


def test_a_task_that_can_be_learnt_ends_with_the_prompt(helpful: Trained) -> None:
    assert helpful.last_line.startswith("On 20 validation rows the prompt is right in ")
    assert helpful.last_line.endswith("use the prompt")
    assert helpful.result["recommendation"] == "prompt"


def test_a_task_that_cannot_be_learnt_keeps_the_bare_base(useless: Trained) -> None:
    assert re.match(
        r"On 20 validation rows the prompt is right in \d+ and the bare base .* in \d+: ", useless.last_line
    )
    assert re.search("use the base without a prompt|use neither", useless.last_line)
    assert useless.result["recommendation"] == "bare base"


def test_a_base_that_is_right_everywhere_is_kept(tmp_path: Path) -> None:
    flags = ("--rows", 60, "--max-steps", 2)
    found = trained(tmp_path, data_file("reviews.csv"), KNOWN_TO_THE_BASE, *flags)
    assert "in 20: use the base without a prompt, which leaves nothing to gain" in found.last_line
    assert found.result["recommendation"] == "bare base"


@pytest.mark.parametrize("which", ["helpful", "useless"])
def test_run_record_and_card_say_the_same(which: str, request: pytest.FixtureRequest) -> None:
    found: Trained = request.getfixturevalue(which)
    held_out = found.result["held_out"]
    assert held_out["text"] == found.last_line  # type: ignore[index]
    run = load_prompt(found.out).record.run
    assert (run["held_out"], run["recommendation"]) == (held_out, found.result["recommendation"])
    assert f"{found.last_line}." in (found.out / "README.md").read_text(encoding="utf-8").splitlines()


def test_it_is_shown_again_where_the_prompt_is(useless: Trained) -> None:
    found = useless
    shown = succeed("compare", "--base", "embedded", "--prompt", found.out, "--input", "Good.", "--max-new-tokens", 1)
    assert f"note: run, when it was trained: {found.last_line}\n" in shown.err
    assert succeed("prompts", "show", found.out, "--json").json["record"]["run"]["held_out"]["text"] == found.last_line
    assert "does it help" in succeed("prompts", "show", found.out).out
    assert succeed("runs", "show", found.out, "--json").json["judgements"][""]["text"] == found.last_line
    assert "does it help" in succeed("runs", "show", found.out).out


def test_json_has_the_recommendation_and_the_last_line_of_stderr_the_words(useless: Trained, tmp_path: Path) -> None:
    data = useless.out.parent / "random.csv"
    found = trained(tmp_path, data, REVIEW, "--epochs", 1, "--json")
    assert found.ran.json["recommendation"] == "bare base"
    assert found.ran.json["held_out"]["text"] == found.ran.err.splitlines()[-1] == useless.last_line
    again = succeed("train", "--resume", "--out", found.out, "--json")
    assert again.json == found.ran.json


def split_of(found: Trained) -> Split:
    recorded = RunFolder(found.out).read_plan()
    settings = {name: value for name, value in recorded["data"].items() if name not in ("seed", "folder")}
    return split_rows(DataConfig(**settings), seed=recorded["data"]["seed"])


def assert_validation_was_not_trained_on(found: Trained, split: Split) -> None:
    """What was trained on, by the hash of its text in the record, has none of the rows that it was judged on."""
    assert split.validation is not None
    assert load_prompt(found.out).record.run["data_hash"] == rows_hash(split.train)
    judged = {row.key for row in render_rows(split.validation)}
    assert not judged & {row.key for row in render_rows(split.train)}
    assert not set(split.validation.indices) & set(split.train.indices)


def test_no_row_that_it_is_judged_on_was_trained_on(helpful: Trained) -> None:
    split = split_of(helpful)
    assert_validation_was_not_trained_on(helpful, split)
    assert RunFolder(helpful.out).read_plan()["validation"]["indices"] == list(split.validation.indices)  # type: ignore[union-attr]
    as_if_trained_on = replace(split, validation=split.train.select(range(20)))
    with pytest.raises(AssertionError):  # the control
        assert_validation_was_not_trained_on(helpful, as_if_trained_on)


def test_plain_text_is_not_judged(tmp_path: Path) -> None:
    flags = ("--data", data_file("quotes.jsonl"), "--text-column", "quote", "--rows", 30, "--validation", 10)
    ran = succeed(*TRAIN, *flags, "--max-steps", 1, "--out", tmp_path / "run", "--json")
    assert "recommendation" not in ran.json and "held_out" not in ran.json
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"].keys() == ran.json.keys() - {"out"}
