"""What is written is read again as it was, whatever the cells hold, in parts as in one piece."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.config import DataConfig
from softprompt.data.stream import Layout, RecordStream, open_stream
from softprompt.data.write import AddedColumn, CsvFormat, table_format
from softprompt.errors import ConfigError

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
ROWS = st.lists(st.fixed_dictionaries({"a": TEXT, "b,\n": TEXT}), min_size=1, max_size=5)
ADDED = (AddedColumn("label", "text"), AddedColumn("confidence", "number"), AddedColumn("tags", "texts"))


def written(folder: Path, name: str, rows, parts) -> Path:
    stream = RecordStream("rows", tuple(rows[0]), len(rows), "", lambda: iter(rows))
    table = table_format(folder / name, stream, ADDED)
    files = []
    for number, some in enumerate(parts):
        files.append(folder / f"{number}.part")
        files[-1].write_bytes(table.part(some, [["x", 0.25, ["B", None]] for _ in some]))
    table.join(files, folder / name)
    return folder / name


@settings(max_examples=12, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_cells_of_any_text_come_back(rows, size):
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("out.csv", "out.jsonl", "out.parquet"):
            path = written(Path(folder), name, rows, parts)
            found = list(open_stream(DataConfig(data=str(path))).records())
            assert [{key: row[key] for key in rows[0]} for row in found] == rows
            own = {key: found[0][key] for key in ("label", "confidence", "tags")}
            if name == "out.csv":
                own = {"label": own["label"], "confidence": float(own["confidence"]), "tags": json.loads(own["tags"])}
            assert own == {"label": "x", "confidence": 0.25, "tags": ["B", None]}


def test_a_table_from_excel_goes_back_to_excel(tmp_path):
    for encoding, has_mark in (("utf-8", False), ("utf-8-sig", True), ("utf-16", True)):
        (tmp_path / "in.csv").write_bytes("a;b\n1;é\n".encode(encoding))
        assert open_stream(DataConfig(data=str(tmp_path / "in.csv"))).layout == Layout(";", has_mark)
    (tmp_path / "in.tsv").write_text("a\tb\n1\t2\n")
    assert open_stream(DataConfig(data=str(tmp_path / "in.tsv"))).layout == Layout(",", False)
    assert CsvFormat(["a"], ADDED[:1], Layout(";", True)).header() == "\ufeffa;label\n".encode()


def test_an_unknown_ending_is_refused(tmp_path):
    stream = RecordStream("rows", ("a",), 0, "", lambda: iter(()))
    with pytest.raises(ConfigError, match=r"ending '.xlsx' is not known; answers can be .csv, .jsonl"):
        table_format(tmp_path / "out.xlsx", stream, ADDED)
