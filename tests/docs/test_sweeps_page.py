"""The files and commands of docs/sweeps.md work as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from softprompt.cli.main import main
from softprompt.demo.job import lay_out_data
from softprompt.demo.tasks import TASKS
from softprompt.storage import load_prompt, load_set

PAGE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


@pytest.mark.medium
def test_the_files_and_commands_of_the_sweeps_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lay_out_data(tmp_path / "demo-out" / "data", TASKS)
    for text in re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        name = text.partition("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(text, encoding="utf-8")
    commands = "".join(re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)).splitlines()
    assert len(commands) == 6
    for command in commands:
        with patch.object(sys, "argv", command.split()), pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err
    assert {item.name for item in (tmp_path / "sweeps" / "first" / "quotes" / "candidates").iterdir()} == {
        "rate0.1-seed0", "rate0.1-seed1", "rate1-seed0", "rate1-seed1", "from-text",
    }  # fmt: skip
    assert load_prompt(tmp_path / "sweeps" / "first" / "reviews").record.form.labels == (" negative", " positive")
    assert len(load_set(tmp_path / "sweeps" / "vote")) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "validation loss (nats per text token)" in shown
    assert "Members of vote on reviews.csv: 3 vote" in shown
