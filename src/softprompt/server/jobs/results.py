"""A job's metrics as a file that its owner can read, as OpenAI gives them: CSV, a line for each step."""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Iterable
from typing import Any

from softprompt.server.jobs.files import Files
from softprompt.server.jobs.records import JobRecords
from softprompt.server.jobs.schemas import Json
from softprompt.server.state.schema import FileRow
from softprompt.storage.atomic import write_file

PURPOSE = "fine-tune-results"
_COLUMNS = ("step", "epoch", "train_loss", "valid_loss", "learning_rate")


def add_results(files: Files, records: JobRecords, owner: str, lines: Iterable[Json]) -> str:
    """Write them down as a file of the owner's; gives its id. Raises StorageError."""
    file, data = files.new_id(), _csv(lines)
    write_file(files.folder / f"{file}.jsonl", data)  # where all files lie
    records.add_file(
        FileRow(
            id=file, owner=owner, filename="step_metrics.csv", purpose=PURPOSE, num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(), created=time.time(),
        )
    )  # fmt: skip
    return file


def _csv(lines: Iterable[Json]) -> bytes:
    steps: dict[int, dict[str, Any]] = {}  # Any: cells of a table
    for line in lines:
        step = steps.setdefault(line["step"], {"step": line["step"]})
        if line["kind"] == "step":
            step |= {"epoch": line["epoch"], "train_loss": line["loss"], "learning_rate": line["learning_rate"]}
        if line["kind"] == "checkpoint":
            step["valid_loss"] = line["validation_loss"]
    text = io.StringIO()
    table = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(steps.values())
    return text.getvalue().encode()
