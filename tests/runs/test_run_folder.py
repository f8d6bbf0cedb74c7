"""A run's folder is never mixed with another's, and nothing of the user's is deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt.errors import AdapterError, ExistsError, StorageError
from softprompt.prompt import SoftPrompt
from softprompt.runs import RunFolder
from softprompt.storage import load_prompt, save_prompt

MakePrompt = Callable[..., SoftPrompt]


@pytest.fixture
def make_prompt() -> MakePrompt:
    def make(seed: int = 0) -> SoftPrompt:
        return SoftPrompt(torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)))

    return make


@pytest.fixture
def run(tmp_path: Path, make_prompt: MakePrompt) -> RunFolder:
    """A finished run of two steps."""
    run = RunFolder.create(tmp_path / "prompts" / "coach")
    run.write_plan({"epochs": 2})
    for step in (2, 10):
        run.append_metrics({"step": step, "loss": 1 / step})
        run.save_checkpoint(step, {None: make_prompt(seed=step)}, {}, {})
    run.finish(make_prompt(seed=10))
    return run


def test_a_runs_life(run: RunFolder, make_prompt: MakePrompt) -> None:
    assert run.read_plan() == {"epochs": 2}
    assert run.read_metrics() == [{"step": 2, "loss": 0.5}, {"step": 10, "loss": 0.1}]
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 10]
    for step, path in run.checkpoints():
        assert torch.equal(load_prompt(path).tensor, make_prompt(seed=step).tensor)
    assert torch.equal(load_prompt(run.path).tensor, make_prompt(seed=10).tensor)
    assert not [name for name in os.listdir(run.path) if name.startswith(".")]


def test_a_checkpoint_and_the_end_may_be_written_again(run: RunFolder, make_prompt: MakePrompt) -> None:
    run.save_checkpoint(10, {None: make_prompt(seed=11)}, {}, {})
    run.finish(make_prompt(seed=11))
    run.write_plan({"epochs": 3})
    for path in (run.path, run.checkpoints()[-1].path):
        assert torch.equal(load_prompt(path).tensor, make_prompt(seed=11).tensor)
    assert len(run.read_metrics()) == 2


def test_an_unfinished_run_is_no_adapter_and_names_its_checkpoints(tmp_path: Path, make_prompt: MakePrompt) -> None:
    run = RunFolder.create(tmp_path / "x")
    run.write_plan({})
    run.save_checkpoint(3, {None: make_prompt()}, {}, {})
    with pytest.raises(AdapterError, match=r"but 'checkpoints/step-3' below it has: give .*/x/checkpoints/step-3"):
        load_prompt(run.path)


def test_numbers_that_json_has_no_word_for(run: RunFolder) -> None:
    run.append_metrics({"loss": float("nan"), "text": "zwei\nZeilen"})
    assert run.read_metrics()[-1] == {"loss": None, "text": "zwei\nZeilen"}
    assert (run.path / "metrics.jsonl").read_bytes().count(b"\n") == 3


class TestExisting:
    def test_is_refused_unless_asked(self, run: RunFolder) -> None:
        with pytest.raises(ExistsError, match="--overwrite"):
            RunFolder.create(run.path)
        assert run.read_plan() == {"epochs": 2}
        with pytest.raises(StorageError, match="exclude each other"):
            RunFolder.create(run.path, resume=True, overwrite=True)

    def test_an_empty_folder_is_new(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        RunFolder.create(tmp_path / "x").write_plan({})

    def test_overwriting_deletes_what_is_ours_and_keeps_the_rest(self, run: RunFolder) -> None:
        (run.path / "notes.txt").write_text("mine")
        (run.path / ".run.json.0123.partial").write_text("left by a killed process")
        RunFolder.create(run.path, overwrite=True)
        assert os.listdir(run.path) == ["notes.txt"]

    def test_overwriting_an_adapter(self, tmp_path: Path, make_prompt: MakePrompt) -> None:
        save_prompt(make_prompt(), tmp_path / "x")
        RunFolder.create(tmp_path / "x", overwrite=True)
        assert os.listdir(tmp_path / "x") == []

    @pytest.mark.parametrize(
        "files",
        [
            {"thesis.txt": "mine"},
            {"README.md": "mine"},
            {"run.json": json.dumps({"a": "tool of another kind"})},
            {"run.json": "{"},
            {"adapter_config.json": json.dumps({"peft_type": "LORA"})},
            {"checkpoints/step-1/weights": "mine", "metrics.jsonl": "{}"},
        ],
    )
    def test_a_users_folder_is_never_overwritten(self, tmp_path: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name).write_text(text)
        with pytest.raises(ExistsError, match="neither a run nor an adapter, so it is not overwritten"):
            RunFolder.create(tmp_path / "x", overwrite=True)
        assert all((tmp_path / "x" / name).read_text() == text for name, text in files.items())

    def test_links_are_unlinked_and_never_followed(self, run: RunFolder, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "data").write_text("mine")
        (run.path / "checkpoints").rename(tmp_path / "moved")
        (run.path / "checkpoints").symlink_to(tmp_path / "precious")
        RunFolder.create(run.path, overwrite=True)
        assert (tmp_path / "precious" / "data").read_text() == "mine"

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("mine")
        with pytest.raises(ExistsError, match="is a file"):
            RunFolder.create(tmp_path / "x", overwrite=True)
        with pytest.raises(StorageError, match="cannot make"):
            RunFolder.create(tmp_path / "x" / "y")


class TestResuming:
    def test_half_a_line_of_a_killed_process_is_dropped(self, run: RunFolder) -> None:
        with open(run.path / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 12, "lo')
        assert len(run.read_metrics()) == 2
        resumed = RunFolder.create(run.path, resume=True)
        resumed.append_metrics({"step": 12})
        assert [line["step"] for line in resumed.read_metrics()] == [2, 10, 12]
        assert resumed.read_plan() == {"epochs": 2}

    @pytest.mark.parametrize("text", [None, "{}", '{"softprompt_run": 2}'])
    def test_nothing_to_resume(self, tmp_path: Path, text: str | None) -> None:
        (tmp_path / "x").mkdir()
        if text is not None:
            (tmp_path / "x" / "run.json").write_text(text)
        with pytest.raises(StorageError, match="is not a run's folder"):
            RunFolder.create(tmp_path / "x", resume=True)
