"""What may be uploaded: JSON lines of one form. A refusal names the broken lines; what is taken, training reads."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.config import DataConfig
from softprompt.data import read_rows
from softprompt.errors import DataError
from softprompt.server.jobs.files_rows import check_rows

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
PAIR = {"prompt": "1 + 1 =", "completion": " 2"}
TEXT = {"text": "words"}
COLUMNS = {
    "template": {"template": "{prompt}", "completion": "{completion}"},
    "chat": {"messages_column": "messages"},
    "plain": {"text_column": "text"},
}


def written(folder: Path, *lines: Any) -> Path:  # Any: bytes as they are, else JSON
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def problem(folder: Path, *lines: Any) -> str:  # Any: as above
    with pytest.raises(DataError) as refusal:
        check_rows(written(folder, *lines))
    return str(refusal.value)


@pytest.mark.parametrize(("form", "row"), [("template", PAIR), ("chat", CHAT), ("plain", TEXT)])
def test_accepted_rows_are_those_that_training_reads(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r", b"", {**row, "more": [1]}, b" ", b"")
    found = check_rows(path)
    assert (found.num_rows, found.form) == (2, form)
    rows = read_rows(DataConfig(data=str(path), **COLUMNS[form]))
    assert (len(rows), rows.form.kind) == (2, form)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON (Expecting property name enclosed in double quotes, column 2)"),
        (b"\xff", "line 2 is not UTF-8 (byte 1 of it)"),
        (b"[1]", "line 2 is no JSON object but a list"),
        (b'"text"', "line 2 is no JSON object but a str"),
        (b"1" * 5000, "line 2 is no JSON object but a str"),
        (b"[" * 100_000, "line 2 is not JSON"),
        ({}, "line 2 has no keys; give one JSON object per line"),
        ({"Prompt": "x"}, "line 2 has the keys 'Prompt'; give"),
        ({**PAIR, **TEXT}, "line 2 holds prompt and completion beside text"),
        ({"prompt": "x"}, "line 2 has no completion"),
        ({"prompt": None, "completion": None}, "line 2 has no prompt and no completion"),
        ({"prompt": "x", "completion": ["y"]}, "line 2: column 'completion' holds no text but a list, ['y']"),
        ({"prompt": "x", "completion": " "}, "line 2 has nothing to learn: prompt and completion must not be blank"),
        ({"prompt": "x", "completion": 1.5}, "line 2: column 'completion' holds no text but a float"),
        (b'{"prompt": "x", "completion": "\\ud800"}', "line 2 holds half of a surrogate pair"),
        (b'{"prompt": "\\udc00 x", "completion": "y", "\\ud800": 1}', "line 2 holds half of a surrogate pair"),
        (TEXT, "line 2 holds text, but the rows before it prompt and completion; a file is of one form"),
        ({"messages": []}, "line 2 has nothing to learn"),
        ({"messages": "hello"}, "line 2: messages must be a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: no assistant turn to learn from"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2, message 1 has the role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "line 2, message 1 (user) has content"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "line 2, message 1 has the role ['user']"),
    ],
)  # fmt: skip
def test_a_broken_line_is_refused_with_its_number(tmp_path: Path, line: Any, message: str) -> None:  # Any: as above
    assert message in problem(tmp_path, PAIR, line)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "the file is empty" in problem(tmp_path, content)


def test_five_broken_lines_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    told = problem(tmp_path, *[PAIR, b"{"] * 9)
    assert re.findall(r"line (\d+)", told) == ["2", "4", "6", "8", "10"]
    assert told.endswith("; and 4 more broken lines")


def test_a_refusal_of_long_lines_is_short(tmp_path: Path) -> None:
    hostile = {"messages": [{"role": "x" * 10**6, "content": "\ud800"}]}
    told = problem(tmp_path, *[hostile, {"k" * 10**6: 1}] * 5)
    told.encode()
    assert len(told) < 1500


def test_a_line_that_is_too_long_is_refused_and_skipped(tmp_path: Path) -> None:
    told = problem(tmp_path, PAIR, {"prompt": "x" * 16 * 2**20, "completion": "y"}, b"{")
    assert "line 2 is longer than 16,777,216 bytes; line 3 is not JSON" in told


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path, *[{"prompt": "x" * 2**16, "completion": "y"}] * 300)
    tracemalloc.start()
    try:
        assert check_rows(path).num_rows == 300
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 8
    finally:
        tracemalloc.stop()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(["prompt", "completion", "text", "messages", "role", "content", "x"])


@given(lines=st.lists(st.binary(max_size=40) | st.dictionaries(_NAMES, _VALUES, max_size=3).map(
    lambda row: json.dumps(row).encode()), max_size=4))  # fmt: skip
def test_any_bytes_are_accepted_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = written(tmp_path_factory.mktemp("any"), *lines)
    try:
        found = check_rows(path)
    except DataError as refusal:
        str(refusal).encode()
        return
    assert found.form is not None
    assert len(read_rows(DataConfig(data=str(path), **COLUMNS[found.form]))) == found.num_rows
