"""The rows that each prompt's training set aside, found again through the prompts' records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.cli.console import say
from softprompt.config import DataConfig
from softprompt.data import Rows, held_out_record, split_rows
from softprompt.errors import ConfigError, DataError, SoftpromptError
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm


class _Recorded(NamedTuple):
    """What a record says of its held-out rows."""

    config: DataConfig
    seed: int
    rows_hash: str


def recorded_sets(prompts: Mapping[str, SoftPrompt], *, offline: bool = False) -> dict[str, Rows]:
    """Held-out sets by name, each once; what cannot be found or has changed is said and left out.

    A set goes by the name of its file or data set, with the prompt's name where two differ.
    """
    found: dict[str, tuple[object, Rows]] = {}
    for name, prompt in prompts.items():
        if not prompt.record.run.get("test"):
            say(f"note: {name} has no record of held-out rows; give --data for a held-out loss")
            continue
        try:
            recorded = _recorded(prompt.record.run)
            key = (recorded.rows_hash, prompt.record.form)
            if key not in [known for known, _ in found.values()]:
                rows = _read(recorded, prompt.record.form, offline)
                title = Path(rows.source).name
                found[title if title not in found else f"{title} ({name})"] = (key, rows)
        except SoftpromptError as error:
            say(f"note: the held-out rows of {name} cannot be read: {error}")
    return {title: rows for title, (_, rows) in found.items()}


def _recorded(run: Mapping[str, Any]) -> _Recorded:  # Any: a record is JSON, and may be a stranger's
    known = {item.name for item in dataclass_fields(DataConfig)}
    try:
        settings = {key: value for key, value in run["data"].items() if key in known}
        seed = run["data"].get("seed", run["plan"]["config"]["seed"])
        folder = Path(run["data"]["folder"])
        moved = {key: _from_folder(settings.get(key), folder) for key in ("data", "test", "validation")}
        return _Recorded(DataConfig(**{**settings, **moved}), seed, run["test"]["hash"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError("its record does not say from where they came; give --data") from error


def _from_folder(path: str | None, folder: Path) -> str | None:
    """A relative path of the training, seen from where the training ran, if it is still there."""
    if path is None or not (folder / path).exists():
        return path
    return str(folder / path)


def _read(recorded: _Recorded, form: InputForm, offline: bool) -> Rows:
    split = split_rows(recorded.config, seed=recorded.seed, offline=offline, form=form)
    if split.test is None or held_out_record(split.test)["hash"] != recorded.rows_hash:
        raise DataError(f"{recorded.config.data} has changed since the training")
    return split.test
