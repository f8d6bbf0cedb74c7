"""Records one after the other are those that are read whole, in little memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from softprompt.config import DataConfig
from softprompt.data.read import read_table
from softprompt.data.stream import open_stream

FILES = {
    "plain.csv": 'a,b\n1,"x, ""y"""\n"two\nlines",\n\n3,é\n',
    "mark.csv": "\ufeffa;b\r\n1;2\r\n",
    "declared.csv": "sep=|\na|b\n1|2\n",
    "mac.csv": "a,b\r1,2\r3,4",
    "header.csv": "a,b\n",
    "literal.tsv": "a\tb\n1\tx y\n",
    "quoted.tsv": 'a\tb\n1\t"x\ty"\n',
    "rows.jsonl": '{"a": 1, "b": [1, {"c": null}]}\n\n"text alone"\r\n{"b": 1.50}',
    "list.json": '[{"a": 1}, {"b": 2}]',
    "lines.txt": "one\r\ntwo\n\nthree\rand more",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_records_are_those_that_are_read_whole(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(FILES[name].encode(encoding))
    config = DataConfig(data=str(path))
    table, stream = read_table(config), open_stream(config)
    assert list(stream.open()) == list(stream.records()) == list(table.records)
    assert stream.num_rows == len(table.records)
    assert list(stream.records(1, 2)) == list(table.records)[1:2]
    assert stream.columns == (table.columns or ("a", "b"))
    assert stream.notes == table.notes


def test_a_parquet_file_is_read_in_its_order(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"n": i, "text": f"row {i}"} for i in range(3_000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=700)
    stream = open_stream(DataConfig(data=str(tmp_path / "in.parquet")))
    assert list(stream.records()) == rows
    assert list(stream.records(2_990)) == rows[2_990:]


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    path = tmp_path / name
    row = "word " * 80
    line = json.dumps({"text": row}) if name == "in.jsonl" else f"1,{row}"
    path.write_text(("" if name == "in.jsonl" else "id,text\n") + f"{line}\n" * 8_000)  # 3 MB, and 6 MB as records
    tracemalloc.start()
    try:
        stream = open_stream(DataConfig(data=str(path)))
        assert sum(1 for _ in stream.records()) == 8_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5e6
