"""docs/predict.md: its commands run on the embedded reviews, and what it shows of the answers is so."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
from support.command_line import succeed
from support.material import write_csv

from softprompt.embedded import data_file

PAGE = (Path(__file__).parents[2] / "docs" / "predict.md").read_text(encoding="utf-8")


@pytest.mark.medium
def test_the_commands_of_the_page_run_and_the_columns_are_those_it_shows(tmp_path: Path) -> None:
    (tmp_path / "labelled.csv").write_bytes(data_file("reviews.csv").read_bytes())
    with open(data_file("reviews-heldout.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    write_csv(tmp_path / "new.csv", [{"id": str(i), "text": row["text"]} for i, row in enumerate(rows, start=1)])
    (block,) = re.findall(r"^```shell\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines():
        ran = succeed(*shlex.split(line)[1:], cwd=tmp_path)
    assert "confidences are calibrated on 100 validation rows" in ran.err
    answers = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert f"\n{answers[0]}\n" in PAGE
    with open(tmp_path / "answers.csv", newline="", encoding="utf-8") as file:
        right = sum(a["label"] == b["label"] for a, b in zip(csv.DictReader(file), rows, strict=True))
    assert right >= 180
