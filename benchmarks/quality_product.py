"""Training as `softprompt train` does it: rows in a file, split as by default, and the best checkpoint kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from quality_cases import Case

from softprompt import Base, DataConfig, TrainConfig
from softprompt.data import Rows, split_rows
from softprompt.evaluation import judge
from softprompt.runs.session import TrainingTask
from softprompt.training import TrainResult, train_together


class Kept(NamedTuple):
    """What the command keeps of a training, and what its last line says of it."""

    result: TrainResult
    recommendation: str | None  # None where it has nothing to judge by


def train_as_command(base: Base, rows: Rows, config: TrainConfig, file: Path) -> Kept:
    """The prompt that the command would keep of these rows, which `file` gets as JSON lines.

    Raises whatever `split_rows` and `train_together` raise.
    """
    write_rows(rows, file)
    split = split_rows(DataConfig(data=str(file), **columns(rows)), seed=config.seed)
    task = TrainingTask(split=split, configs={"": config})
    (result,) = train_together(base, task.candidates(base, 0))
    judged = None
    if split.validation is not None:
        held_out = replace(split.validation, form=result.prompt.record.form)
        judged = judge(base, held_out, result.prompt, config.best_by, train_rows=len(split.train))
    return Kept(result, None if judged is None else judged.recommendation)


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
