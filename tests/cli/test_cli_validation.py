"""Rows kept for validation by default: never trained on, never compared on, the same ones when a run is resumed."""

from __future__ import annotations

import json

import pytest
from support.command_line import succeed
from support.material import QUICK, TEMPLATE, chat, review, write_jsonl

from softprompt.config import DataConfig
from softprompt.data import Rows, read_rows
from softprompt.data.rows import render_rows
from softprompt.runs import RunFolder


@pytest.fixture
def train(base_folder, tmp_path):
    """Train on 48 labelled rows, 20 of them kept for validation, and 12 test rows behind."""
    data = write_jsonl(tmp_path / "reviews.jsonl", [review(i) for i in range(60)])
    fixed = ("train", "--base", base_folder, *QUICK, "--data", data, *TEMPLATE, "--rows", 48)
    return lambda *flags, out="run": succeed(*fixed, *flags, "--out", tmp_path / out)


def plan_of(folder):
    return RunFolder(folder).read_plan()


def keys(rows: Rows) -> set[str]:
    return {row.key for row in render_rows(rows)}


def test_a_labelled_set_keeps_rows_and_says_so(train, tmp_path):
    ran = train()
    assert "20 of 48 rows are kept for validation (labels); --validation none trains on all" in ran.err
    plan = plan_of(tmp_path / "run")
    assert len(plan["validation"]["indices"]) == 20
    assert plan["data"]["validation"] == plan["settings"]["validation"] == "20"
    assert len(plan["result"]["validation_losses"]) == 2
    record = json.loads((tmp_path / "run" / "softprompt.json").read_text())["run"]
    assert record["validation"] == plan["validation"]


def test_validation_none_trains_on_all_rows(train, tmp_path):
    ran = train("--validation", "none")
    assert "kept for validation" not in ran.err
    plan = plan_of(tmp_path / "run")
    assert plan["validation"] is None and plan["data"]["validation"] == "none"
    assert plan["result"]["validation_losses"] == []


def test_compare_shows_no_row_that_was_trained_on_or_validated(train, base_folder, tmp_path, monkeypatch):
    """The test rows are those of a training on all rows. A file called as the number of rows is not read for it."""
    train()
    train("--validation", "none", out="all")
    (tmp_path / "20").write_text("text\nelsewhere\n")
    plan = plan_of(tmp_path / "run")
    assert plan["test"] == plan_of(tmp_path / "all")["test"]
    used = set(range(48))
    assert set(plan["validation"]["indices"]) < used
    assert not used & set(plan["test"]["indices"])
    monkeypatch.chdir(tmp_path)
    flags = ("--prompt", tmp_path / "run", "--prompt", tmp_path / "all", "--dtype", "float32", "--json")
    found = succeed("compare", "--base", base_folder, *flags).json
    assert {loss["num_rows"] for loss in found["losses"]} == {12}
    rows = read_rows(DataConfig(data=str(tmp_path / "reviews.jsonl"), template="{text}", completion=" {label}"))
    shown = {index for loss in found["losses"] for index in (*loss["better_rows"], *loss["worse_rows"])}
    assert shown <= set(plan["test"]["indices"])
    assert not keys(rows.select(sorted(shown))) & keys(rows.select(sorted(used)))


def forget_result(folder, change=lambda plan: None):
    plan = {key: value for key, value in plan_of(folder).items() if key != "result"}
    change(plan)
    RunFolder(folder).write_plan(plan)


def test_a_resumed_run_keeps_the_same_rows(train, tmp_path):
    train()
    begun = plan_of(tmp_path / "run")
    forget_result(tmp_path / "run")
    ran = succeed("train", "--resume", "--out", tmp_path / "run")
    assert "resumed after step" in ran.err
    assert plan_of(tmp_path / "run")["validation"] == begun["validation"]
    assert plan_of(tmp_path / "run")["result"] == begun["result"]


def test_a_run_of_an_earlier_release_is_resumed_on_all_its_rows(train, tmp_path):
    """It recorded no validation as null, where "none" stands today."""

    def as_recorded_then(plan):
        plan["settings"]["validation"] = plan["data"]["validation"] = None
        del plan["validation"]

    train("--validation", "none")
    forget_result(tmp_path / "run", as_recorded_then)
    ran = succeed("train", "--resume", "--out", tmp_path / "run")
    assert "resumed after step" in ran.err
    assert "kept for validation" not in ran.err
    assert plan_of(tmp_path / "run")["validation"] is None


SWEEP = """
[data]
data = "reviews.jsonl"
template = "w5 {text} w6"
completion = " {label}"
rows = 48
[train]
virtual_tokens = 3
epochs = 2
"""


@pytest.mark.parametrize("is_old", [False, True], ids=["of this release", "of an earlier one"])
def test_a_sweep_keeps_rows_too_and_is_resumed_with_them(base_folder, tmp_path, is_old):
    write_jsonl(tmp_path / "reviews.jsonl", [review(i) for i in range(60)])
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(SWEEP + '[tasks.one]\nvalidation = "none"\n' if is_old else SWEEP + "[tasks.one]\n")
    fixed = ("sweep", sweep, "--base", base_folder, "--dtype", "float32", "--out", tmp_path / "run")
    ran = succeed(*fixed)
    assert ("20 of 48 rows are kept for validation" in ran.err) is not is_old
    begun = plan_of(tmp_path / "run")["tasks"]["one"]

    def as_recorded_then(plan):
        if is_old:
            plan["tasks"]["one"]["data"]["validation"] = None
            plan["sweep"]["tasks"]["one"]["validation"] = None

    sweep.write_text(SWEEP + "[tasks.one]\n")
    forget_result(tmp_path / "run", as_recorded_then)
    ran = succeed(*fixed, "--resume")
    assert "resumed after step" in ran.err
    assert plan_of(tmp_path / "run")["tasks"]["one"]["validation"] == begun["validation"]


def test_two_rows_still_train(base_folder, tmp_path):
    data = write_jsonl(tmp_path / "two.jsonl", [review(i) for i in range(2)])
    ran = succeed("train", "--base", base_folder, *QUICK, "--data", data, *TEMPLATE, "--out", tmp_path / "run")
    assert "saved to" in ran.err


def test_a_task_score_needs_no_validation_of_its_own(train, tmp_path):
    train("--best-by", "accuracy")
    assert len(plan_of(tmp_path / "run")["result"]["scores"]) == 2


@pytest.mark.parametrize(("score", "words"), [("chrf", "scores 0."), ("exact_match", "is right in ")])
def test_a_score_of_chats_keeps_rows_and_judges_by_greedy_answers(base_folder, tmp_path, score, words):
    data = write_jsonl(tmp_path / "chats.jsonl", [chat(i) for i in range(44)])
    flags = ("--data", data, "--best-by", score, "--epochs", 1, "--out", tmp_path / "run")
    ran = succeed("train", "--base", base_folder, *QUICK, *flags)
    assert "20 of 44 rows are kept for validation (a task score); --validation none trains on all" in ran.err
    assert ran.out.splitlines()[-1].startswith(f"On 20 validation rows the prompt {words}")
    assert "the bare base with the same template" not in ran.out  # a chat has none
    assert plan_of(tmp_path / "run")["result"]["held_out"]["measure"] == score
