"""Rows that JSON can spell and no text can be: half surrogates, endless numbers, keys that stand twice."""

from __future__ import annotations

import json

import pytest

from softprompt.config import DataConfig
from softprompt.data import read_rows, rows_from_records, rows_from_texts
from softprompt.data.rows import render_rows
from softprompt.errors import DataError

HALF = "So happy \ud83d"
DIGITS = "9" * 5_000


def read(path, content, **settings):
    path.write_text(content)
    return [row.text for row in render_rows(read_rows(DataConfig(data=str(path), **settings)))]


def chat(user, answer):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"text": HALF, "label": "a"}, {"text_column": "text"}),
        ({"text": HALF, "label": "a"}, {"template": "{text}", "completion": "{label}"}),
        ({"text": "a", "label": HALF}, {"label_column": "label"}),
        (chat(HALF, "a"), {}),
        (chat("a", HALF), {}),
    ],
    ids=["text", "field", "label", "user", "assistant"],
)
def test_half_of_a_surrogate_pair_is_refused_by_row(tmp_path, row, settings):
    good = {key: "b" if isinstance(value, str) else chat("a", "b")[key] for key, value in row.items()}
    content = "".join(json.dumps(each) + "\n" for each in (good, row))
    with pytest.raises(DataError, match=r"^row 2 of .*a.jsonl holds half of a surrogate pair, which is no text$"):
        read(tmp_path / "a.jsonl", content, **settings)
    with pytest.raises(DataError, match=r"^row 2 of records holds half of a surrogate pair, which is no text$"):
        render_rows(rows_from_records([good, row], **settings))


def test_half_of_a_surrogate_pair_in_a_column_that_is_not_read_changes_nothing(tmp_path):
    assert read(tmp_path / "a.jsonl", json.dumps({"text": "a", "note": HALF}), text_column="text") == ["a"]
    assert read(tmp_path / "b.jsonl", r'{"text": "\ud83d\ude00"}') == ["\U0001f600"], "a whole pair is one character"


@pytest.mark.parametrize(("name", "form"), [("a.jsonl", "{}\n"), ("a.json", "[{}]")])
def test_a_whole_number_of_any_length_is_read(tmp_path, name, form):
    row = f'{{"text": "a", "n": -{DIGITS}}}'
    assert read(tmp_path / name, form.replace("{}", row)) == ["a"]
    assert read(tmp_path / name, form.replace("{}", row), template="{text}", completion="{n}") == [f"-{DIGITS}"]


def test_a_number_of_very_many_digits_in_python_is_refused_by_row():
    rows = rows_from_records([{"text": "a", "n": 10**5_000}], template="{text}", completion="{n}")
    with pytest.raises(DataError, match=r"^row 1 of records: column 'n' holds a number of very many digits"):
        render_rows(rows)
    rows = rows_from_records([{"n": 10**5_000}], text_column="n")
    with pytest.raises(DataError, match="column 'n' holds no text but a int, a number of very many digits"):
        render_rows(rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "text": "b"}',
            "a.jsonl, line 2 has the key 'text' twice in one object",
        ),
        ("a.json", '[{"text": {"a": 1, "a": 1}}]', "a.json has the key 'a' twice in one object; keep one"),
        ("a.jsonl", '{"text": ' + "[" * 200_000, "a.jsonl, line 1 is not JSON (nested too deeply)"),
        ("a.json", "[" * 200_000, "a.json is not JSON (nested too deeply)"),
    ],
)
def test_json_that_cannot_be_meant_is_refused_in_a_sentence(tmp_path, name, content, said):
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, content)
    assert said in str(caught.value)


def test_nan_is_an_empty_cell_and_an_escaped_nul_is_a_character(tmp_path):
    content = '{"text": "a\\u0000b"}\n{"text": NaN}\n'
    assert read(tmp_path / "a.jsonl", content) == ["a\0b", ""]


def test_one_text_is_no_list_of_texts():
    for make in (rows_from_texts, rows_from_records):
        with pytest.raises(DataError, match="the data is one text, 'text'; give a list of texts"):
            make("text")
