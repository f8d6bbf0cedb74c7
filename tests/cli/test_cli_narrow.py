"""What is listed fits a narrow terminal, a line for each; what a pipe sees of a long training."""

from __future__ import annotations

import shutil

import pytest
from rich.cells import cell_len
from support.command_line import run_encoded, succeed

from softprompt.cli.training_run import training_progress
from softprompt.training import StepDone

LONG = "a-prompt-with-a-name-that-is-as-long-as-a-name-may-be-0123456789"


@pytest.fixture(scope="module")
def shelf(library, place):
    folder = place / "narrow"
    for name in ("coach", "critic"):
        shutil.copytree(library / name, folder / name)
    shutil.copytree(library / "coach", folder / LONG)
    shutil.copytree(library / "coach", folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 9)
    return folder


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def rows_of(shown):
    """The lines of the table's body."""
    return [line for line in shown.splitlines() if line.startswith("│")][1:]


@pytest.mark.parametrize("arguments", [("prompts", "list", "--library"), ("runs", "list")])
def test_a_list_has_one_line_per_row_and_long_cells_are_cut(shelf, arguments):
    shown = succeed(*arguments, shelf).out
    assert max(map(cell_len, shown.splitlines())) <= 80
    rows = rows_of(shown)
    assert [row.split("│")[1].split()[0][:12] for row in rows] == [LONG[:12], "broken", "coach", "critic"]
    assert "…" in rows[0]
    assert "broken is broken: " in shown
    machine = succeed(*arguments, shelf, "--json").json
    assert LONG in [entry.get("name", entry.get("run")) for entry in machine]


def test_a_list_in_a_wide_terminal_is_not_cut(shelf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shown = succeed("prompts", "list", "--library", shelf).out
    assert LONG in shown
    assert "…" not in shown


def test_an_ellipsis_is_dots_where_the_encoding_has_none(shelf):
    shown = run_encoded("latin-1", "prompts", "list", "--library", shelf).out
    assert "a-prompt-with..." in shown or "..." in shown
    assert "\\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_prompt_is_shown_without_a_wrapped_line(shelf, base_folder):
    shown = succeed("prompts", "show", LONG, "--library", shelf, "--base", base_folder).out
    assert max(map(cell_len, shown.splitlines())) <= 80
    facts, tokens = shown.split("Virtual tokens")
    assert [row.split("│")[1].strip() for row in rows_of(tokens)] == ["0", "1", "2"]
    assert all(row.split("│")[1].strip() for row in rows_of(facts)), "a wrapped cell leaves the first one empty"
    whole = succeed("prompts", "show", LONG, "--library", shelf, "--base", base_folder, "--json").json
    assert len(whole["content_hash"]) == 64


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def step_done(step):
    return StepDone(
        step=step, epoch=step / 50, loss=2.5, learning_rate=0.1, grad_norm=1.0, num_rows=4, num_tokens=60,
        num_targets=50, seconds=0.5,
    )  # fmt: skip


def test_progress_in_a_pipe_is_a_line_every_few_seconds(capsys):
    clock = Clock()
    with training_progress(clock) as progress:
        progress.begin(1_000)
        for step in range(1, 41):
            clock.now += 0.5
            progress.show(step_done(step))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"step {step} of 1" for step in (10, 20, 30, 40)]
    assert lines[0] == "step 10 of 1,000, loss 2.500, 120 tokens/s, 8:15 left"


def test_a_short_training_prints_no_progress(capsys):
    clock = Clock()
    with training_progress(clock) as progress:
        progress.begin(8)
        for step in range(1, 9):
            clock.now += 0.5
            progress.show(step_done(step))
    assert capsys.readouterr().err == ""
