"""Training as `softprompt train` does it: rows in a file, split as by default, and the best checkpoint kept."""

from __future__ import annotations

import json
from pathlib import Path

from quality_cases import Case

from softprompt import Base, DataConfig, TrainConfig
from softprompt.data import Rows, split_rows
from softprompt.runs.session import TrainingTask
from softprompt.training import TrainResult, train_together


def train_as_command(base: Base, rows: Rows, config: TrainConfig, file: Path) -> TrainResult:
    """The prompt that the command would keep of these rows, which `file` gets as JSON lines.

    Raises whatever `split_rows` and `train_together` raise.
    """
    write_rows(rows, file)
    split = split_rows(DataConfig(data=str(file), **columns(rows)), seed=config.seed)
    task = TrainingTask(split=split, configs={"": config})
    return train_together(base, task.candidates(base, 0))[0]


def write_rows(rows: Rows, file: Path) -> None:
    """Whole or not at all, as several processes may write the same."""
    new = file.with_suffix(f".{id(rows)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    new.write_text("".join(f"{json.dumps(dict(record))}\n" for record in rows.records))
    new.replace(file)


def columns(rows: Rows) -> dict[str, str]:
    """The settings that read such rows from a file."""
    form = rows.form
    if form.kind == "template":
        assert form.template is not None and form.completion is not None, form
        return {"template": form.template, "completion": form.completion}
    assert rows.column is not None, form
    return {"messages_column" if form.kind == "chat" else "text_column": rows.column}


def rows_file(case: Case, folder: Path) -> Path:
    return folder / f"{case.name}-rows.jsonl"
