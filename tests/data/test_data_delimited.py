"""CSV and TSV files as other programs write them: separators, quote marks, encodings."""

from __future__ import annotations

import csv
import io

import pytest

from softprompt.config import DataConfig
from softprompt.data import read_rows
from softprompt.data.rows import render_rows
from softprompt.errors import ConfigError, DataError

ROWS = [["text", "label"], *([f"text {i}, and more", "ab"[i % 2]] for i in range(6))]


def written(rows, delimiter, **ways):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, **ways).writerows(rows)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    def call(name, content, **settings):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows = read_rows(DataConfig(data=str(path), **{"text_column": "text", **settings}))
        return [row.text for row in render_rows(rows)], list(rows.notes)

    return call


@pytest.fixture
def refusal(read, tmp_path):
    def call(*arguments, **settings):
        with pytest.raises((DataError, ConfigError)) as caught:
            read(*arguments, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return call


@pytest.mark.parametrize(("mark", "shown"), [(";", "';'"), ("|", "'|'"), ("\t", "tabs")])
def test_a_csv_with_another_separator_is_read_by_it_and_says_so(read, mark, shown):
    texts, notes = read("a.csv", written(ROWS, mark))
    assert texts == [row[0] for row in ROWS[1:]]
    assert notes[0] == f"cells are separated by {shown}"


def test_a_tsv_with_commas_is_read_by_them(read):
    texts, notes = read("a.tsv", written(ROWS, ","))
    assert texts == [row[0] for row in ROWS[1:]]
    assert notes[0] == "cells are separated by commas"


def test_a_separator_that_does_not_fit_every_row_is_refused_by_line(refusal):
    assert refusal("a.csv", "text;label\na;b\nc;d;e\n") == (
        "a.csv: its first line has no commas and looks separated by ';', but line 3 has 3 cells where it has 2; "
        "give the separator of the cells with --delimiter"
    )


def test_a_separator_that_is_given_is_the_one(read, refusal):
    assert read("a.csv", "text;label\na;b\n", delimiter=",", text_column="text;label")[0] == ["a;b"]
    assert read("a.csv", "text,x;label,y\na,b;c\n", delimiter=";", text_column="text,x")[0] == ["a,b"]
    assert read("a.csv", "text\tlabel\na\tb\n", delimiter=r"\t")[0] == ["a"]
    assert refusal("a.jsonl", '{"text": "a"}', delimiter=";") == (
        "delimiter is ';', but a.jsonl is no CSV or TSV file; leave it out"
    )


def test_excels_line_that_names_the_separator_is_no_row(read, refusal):
    assert read("a.csv", "sep=;\r\ntext;label\r\na, b;c\r\n")[0] == ["a, b"]
    assert refusal("a.csv", 'sep=;\ntext;label\na;"b\n').startswith("a.csv, line 3: broken CSV")


def test_one_column_without_a_separator_stays_one_column(read):
    assert read("a.csv", "text\na; b\nc | d\n") == (["a; b", "c | d"], [])
    assert read("a.csv", '"text; or more"\na; b\n', text_column="text; or more")[0] == ["a; b"]


def test_rows_of_a_tsv_are_lines_and_its_quote_marks_are_characters(read):
    content = 'text\tlabel\nThe dog.\tbad\n"Where? asked Tom.\tbad\nThe cat.\tgood\nIt is "\tgood\n'
    texts, notes = read("a.tsv", content, text_column=None, template="{text}", completion="{label}")
    assert len(texts) == 4
    assert notes == ["quote marks at the start of a cell are characters, and each line is a row, as in any TSV"]
    assert read("b.tsv", 'text\tlabel\nso "they" say\tx\n')[0] == ['so "they" say']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_that_a_csv_writer_made_is_read_as_it_was_meant(read, quoting, end):
    rows = [["text", "label"], ["two\nlines", "a"], ['said "so"', "b"], ["with\ttab", "c"], ["plain", "d"]]
    texts, notes = read("a.tsv", written(rows, "\t", quoting=quoting, lineterminator=end))
    assert texts == [row[0] for row in rows[1:]]
    assert notes[0] == "cells in quote marks are read as a CSV's, without them"


def test_a_tsv_whose_lines_do_not_fit_is_refused_by_line(refusal):
    said = refusal("a.tsv", 'text\tlabel\n"a\nb"\tx\ny "z" "\tk\n')
    assert said.startswith("a.tsv, line 2: 1 cells where the first line names 2 columns; a row of a TSV is one line")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_excels_encodings_are_read(read, encoding):
    mark = "" if encoding in ("utf-8-sig", "utf-16") else "\ufeff"
    assert read("a.csv", (mark + "text;label\r\nCafé;b\r\n").encode(encoding))[0] == ["Café"]


def test_what_is_no_text_is_refused_in_a_sentence(refusal):
    assert refusal("a.csv", "text\nab\n".encode("utf-16-le")).startswith("a.csv, line 1 holds a NUL character: ")
    assert refusal("a.csv", b"\xff\xfea").startswith("a.csv is not UTF-16: ")
    assert (
        refusal("a.csv", "\n<!DOCTYPE html>\n<html>")
        == "a.csv is a web page (HTML), not data; download the file itself"
    )
