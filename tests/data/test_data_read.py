import json
import os
from pathlib import Path

import pytest

from softprompt.config import DataConfig
from softprompt.data import read_rows, render_row, rows_from_records, rows_from_texts
from softprompt.data.rows import render_rows
from softprompt.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
# Strings that a reader which guesses types turns into nulls, numbers, dates or booleans.
TRICKY = ["NA", "null", "None", "nan", "1", "007", "1e5", "true", "2020-01-01 00:00:00", " padded ", "a\u2028b\x0bc"]


def texts(rows):
    return [row.text for row in render_rows(rows)]


def read(path, content=None, **settings):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content, encoding="utf-8", newline="")
    return read_rows(DataConfig(data=str(path), **settings))


def refusal(path, content, **settings):
    with pytest.raises((DataError, ConfigError)) as caught:
        read(path, content, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path.parent) + os.sep, "")


@pytest.mark.parametrize("guess", TRICKY)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "txt"])
def test_a_cell_is_exactly_the_text_in_the_file(tmp_path, ending, guess):
    contents = {
        "csv": f"id,text\n1,{guess}\n2,{guess}\n",
        "tsv": f"id\ttext\n1\t{guess}\n2\t{guess}\n",
        "jsonl": "\n".join(json.dumps({"id": 1, "text": guess}) for _ in range(2)),
        "json": json.dumps([{"id": 1, "text": guess}] * 2, indent=1),
        "txt": f"{guess}\n{guess}\n",
    }
    assert texts(read(tmp_path / f"a.{ending}", contents[ending], text_column="text")) == [guess, guess]


def test_quoted_newlines_long_cells_and_a_byte_order_mark(tmp_path):
    long = "word " * 40_000
    content = f'\ufefftext,other\r\n"one\r\ntwo, ""three""",x\r\n"{long}",y\r\n'
    assert texts(read(tmp_path / "a.csv", content, text_column="text")) == ['one\r\ntwo, "three"', long]
    assert texts(read(tmp_path / "b.jsonl", '\ufeff{"text": "a"}\n\n{"text": "b"}\n')) == ["a", "b"]
    assert texts(read(tmp_path / "c.txt", "\ufeffa\r\n\r\nb")) == ["a", "", "b"]


def test_parquet_and_folders_leave_no_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_dict({"text": ["NA", "b", None], "label": [0, 1, 0]})
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "parts")
    assert texts(read(tmp_path / "a.parquet")) == ["NA", "b", ""]
    assert texts(read(tmp_path / "saved")) == ["NA", "b", ""]
    assert texts(read(tmp_path / "parts")) == ["NA", "b", ""]
    assert texts(read(tmp_path / "parts", split="dev")) == ["b"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=r"has no split 'test'; it has 'train', 'dev'"):
        read(tmp_path / "parts", split="test")
    assert refusal(tmp_path / "b.parquet", "no parquet").startswith("b.parquet cannot be read: ")


def test_reading_shows_nothing_and_puts_the_progress_bars_back(tmp_path, capfd):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    datasets.utils.enable_progress_bars()
    capfd.readouterr()
    read(tmp_path / "a.parquet")
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "json", "jsonl", "parquet"])
def test_a_git_lfs_pointer_is_refused_as_data(tmp_path, ending):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    said = refusal(tmp_path / f"a.{ending}", pointer)
    assert said == f"a.{ending} is a Git LFS pointer, not the file itself; fetch the file with git lfs pull"


def test_text_that_only_mentions_git_lfs_is_read(tmp_path):
    about = "version https://git-lfs.github.com is where Git LFS lives"
    assert texts(read(tmp_path / "a.txt", about)) == [about]


def test_a_folder_of_files_is_read_in_order_and_by_split(tmp_path):
    (tmp_path / "train-1.txt").write_text("b\n")
    (tmp_path / "train-0.txt").write_text("a\n")
    (tmp_path / "test.txt").write_text("c\n")
    (tmp_path / "README.md").write_text("about")
    assert texts(read(tmp_path)) == ["a", "b"]
    assert texts(read(tmp_path, split="test")) == ["c"]
    with pytest.raises(DataError, match=r"has no file for split 'dev'; it has test.txt, train-0.txt, train-1.txt"):
        read(tmp_path, split="dev")
    (tmp_path / "train.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"files of several kinds \(.csv, .txt\)"):
        read(tmp_path)


def test_rows_are_the_first_unless_shuffled(tmp_path):
    content = "\n".join(map(str, range(50)))
    assert read(tmp_path / "a.txt", content, rows=3).indices == (0, 1, 2)
    assert len(read(tmp_path / "a.txt", rows=500)) == 50
    path = DataConfig(data=str(tmp_path / "a.txt"), rows=10, shuffle=True)
    shuffled = read_rows(path, seed=1)
    assert shuffled.indices == read_rows(path, seed=1).indices != read_rows(path, seed=2).indices
    assert texts(shuffled) == [str(index) for index in shuffled.indices]
    assert refusal(tmp_path / "a.txt", None, rows=0) == "rows is 0; it must be at least 1"


def test_a_set_without_settings_is_read_by_its_columns():
    assert rows_from_records([{"text": "a", "title": "b"}]).column == "text"
    assert rows_from_records([{"id": 1, "quote": "a"}, {"quote": None}]).column == "quote"
    assert rows_from_records([{"messages": [], "text": "a"}]).form.kind == "chat"
    assert texts(rows_from_texts(["a", "b"])) == ["a", "b"]


def test_a_template_accepts_text_and_whole_numbers(tmp_path):
    rows = read(
        tmp_path / "a.jsonl", '{"text": "x {y}", "label": 0}', template=r"Review: {text}\nSo:", completion=" {label}"
    )
    assert render_row(rows, 0)[:2] == (" 0", "Review: x {y}\nSo:")
    assert rows.form.template == "Review: {text}\nSo:"


def test_missing_blank_and_nan_cells_are_empty_rows():
    def is_empty(**record):
        rows = rows_from_records([record], template="Q: {q}\nA:", completion=" {a}")
        return render_row(rows, 0).is_empty

    assert not is_empty(q="x", a=0)
    assert is_empty(q="x", a=None)
    assert is_empty(q="x", a=float("nan"))
    assert is_empty(q="x", a=" ")
    assert is_empty(q="", a="y")
    assert [row.is_empty for row in render_rows(rows_from_texts(["a", "", " \n\t"]))] == [False, True, True]


BAD = {
    "empty file": ("a.csv", "", {}, "a.csv is an empty file; there is nothing to learn from"),
    "header only": ("a.csv", "text\n", {}, "a.csv has no rows; there is nothing to learn from"),
    "ending": ("a.docx", "x", {}, "a.docx: ending '.docx' is not known; data can be .csv, .tsv, .json, .jsonl"),
    "latin-1": (
        "a.csv",
        "text\nok\ncaf\xe9\n".encode("latin-1"),
        {},
        "a.csv is not UTF-8: byte 0xe9 in line 3 (byte 11 of the file); save it as UTF-8",
    ),
    "too many cells": (
        "a.csv",
        "text,b\na,b\nhello, you,b\n",
        {},
        "a.csv, line 3: 3 cells where the first line names 2 columns; quote cells that hold",
    ),
    "too few cells": ("a.csv", "text,b\na\n", {}, "a.csv, line 2: 1 cells where the first line names 2 columns"),
    "open quote": ("a.csv", 'text\n"a\nb\n', {}, "a.csv, line 3: broken CSV (unexpected end of data)"),
    "twice": ("a.csv", "text,text\na,b\n", {}, "a.csv: column 'text' stands twice in the first line; rename one"),
    "broken line": (
        "a.jsonl",
        '{"text": "a"}\n\n{"text": \n',
        {},
        "a.jsonl, line 3 is not JSON (Expecting value, column 10)",
    ),
    "broken list": ("a.json", '[{"text": "a"},\n{"text" "b"}]', {}, "a.json, line 2 is not JSON (Expecting ':' del"),
    "no object": ("a.jsonl", '{"text": "a"}\n3\n', {}, "a.jsonl, line 2 is a int; give objects with named columns"),
    "wrong column": (
        "a.csv",
        "quote,author\na,b\n",
        {"text_column": "qoute"},
        "a.csv has no column 'qoute'; did you mean 'quote'? the columns are 'quote', 'author'",
    ),
    "wrong field": (
        "a.csv",
        "quote,author\na,b\n",
        {"template": "{Quote}", "completion": "{author}"},
        "a.csv: template '{Quote}' asks for 'Quote'; did you mean 'quote'? the columns are",
    ),
    "two text columns": (
        "a.csv",
        "quote,author\na,b\n",
        {},
        "a.csv: 2 columns hold text ('quote', 'author'); name one with text_column",
    ),
    "no text column": (
        "a.jsonl",
        '{"id": 1, "n": 2}\n',
        {},
        "a.jsonl: no column holds text ('id', 'n'); name one with text_column",
    ),
    "no text": (
        "a.jsonl",
        '{"text": "a"}\n{"text": 3.5}\n',
        {},
        "row 2 of a.jsonl: column 'text' holds no text but a float, 3.5; choose another column",
    ),
    "no completion": ("a.csv", "text\na\n", {"template": "{text}"}, "template '{text}' needs a completion too"),
    "no template": ("a.csv", "text\na\n", {"completion": "{text}"}, "completion '{text}' needs a template too"),
    "constant completion": (
        "a.csv",
        "text\na\n",
        {"template": "{text}", "completion": " x"},
        "completion ' x' has no {column} field",
    ),
    "two forms": (
        "a.csv",
        "text\na\n",
        {"text_column": "text", "messages_column": "text"},
        "text_column and messages_column exclude each other; give one",
    ),
    "no list of messages": (
        "a.jsonl",
        '{"messages": "hi"}',
        {},
        "row 1 of a.jsonl: messages must be a list of {role, content}, not a str",
    ),
    "no role": (
        "a.jsonl",
        '{"messages": [{"from": "human", "value": "hi"}]}',
        {},
        "row 1 of a.jsonl, message 1 has no role; its keys are from, value",
    ),
    "unknown role": (
        "a.jsonl",
        '{"messages": [{"role": "human", "content": "hi"}]}',
        {},
        "row 1 of a.jsonl, message 1 has the role 'human'; known are system, developer, user, assistant",
    ),
    "no content": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": 3}]}',
        {},
        "row 1 of a.jsonl, message 1 (user) has content that is no string but a int",
    ),
    "no assistant": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}',
        {},
        "row 1 of a.jsonl: no assistant turn to learn from (the roles are user)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_in_one_sentence_with_file_and_line(case, tmp_path):
    name, content, settings, expected = BAD[case]
    if isinstance(content, str) and not content:
        (tmp_path / name).touch()

    def read_and_write(path, content, **settings):
        return render_rows(read(path, content, **settings))

    with pytest.raises((DataError, ConfigError)) as caught:
        read_and_write(tmp_path / name, content or None, **settings)
    message = str(caught.value).replace(str(tmp_path) + os.sep, "")
    assert message.startswith(expected)
    assert "\n" not in message


def test_a_missing_path_is_named_where_it_was_looked_for(tmp_path):
    missing = tmp_path / "no" / "such.csv"
    with pytest.raises(DataError) as caught:
        read(missing)
    assert str(missing) in str(caught.value)
    for name in ("such.csv", "data/such.csv", "./quotes", "quotes"):
        with pytest.raises(DataError, match=r"there is no data at .* \(looked at /.*; a Hub data set is org/name\)"):
            read_rows(DataConfig(data=name))


def test_offline_never_asks_the_hub(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(DataError, match=r"Hub data set 'no-such/set' cannot be read: .*OfflineMode"):
        read_rows(DataConfig(data="no-such/set"), offline=True)


def test_a_hub_set_is_asked_for_by_name_subset_and_split(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(read_rows(DataConfig(data="org/name"))) == ["a"]
    assert texts(read_rows(DataConfig(data="org/name", subset="small", split="test"))) == ["a"]
    assert asked == [("org/name", None, "train"), ("org/name", "small", "test")]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_the_notebooks_csv_and_json_files_are_read():
    coach = read(SHARED / "awesome-chatgpt-prompts" / "prompts.csv", text_column="prompt", rows=50)
    quotes = read(SHARED / "english-quotes" / "quotes.jsonl", text_column="quote", rows=25)
    assert len(coach) == 50 and texts(coach)[0].startswith("I want you to act as a linux terminal.")
    assert len(quotes) == 25
