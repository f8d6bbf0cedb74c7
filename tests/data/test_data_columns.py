"""Which form is guessed from the columns, and what is said of those that training does not use."""

from __future__ import annotations

import json

import pytest

from softprompt.config import DataConfig
from softprompt.data import read_rows, rows_from_records, split_rows
from softprompt.data.rows import render_rows
from softprompt.errors import ConfigError, DataError

REVIEWS = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(6)]


def made(records, **settings):
    return rows_from_records(records, source="a.csv", **settings)


def with_columns(**more):
    return [{**row, **more} for row in REVIEWS]


def test_a_text_with_a_label_is_a_classification_and_says_so():
    rows = made(REVIEWS)
    assert (rows.form.template, rows.form.completion) == ("{text}\nLabel:", " {label}")
    assert render_rows(rows)[0][:2] == (" bad", "text 0\nLabel:")
    (note,) = rows.notes
    assert note == (
        "labels in column 'label' (2: 'bad', 'good'), learned as \"{text}\\nLabel: {label}\"; "
        "--text-column text alone trains a language model, and a --template in words of the task may do better"
    )


def test_a_text_column_that_is_named_alone_stays_a_language_model_and_the_labels_are_named():
    rows = made(REVIEWS, text_column="text")
    assert rows.form.kind == "plain"
    assert rows.notes == ("columns not used: 'label' (--label-column label learns the 2 labels 'bad', 'good')",)


@pytest.mark.parametrize(
    "records",
    [
        [{"sentence": f"s {i}", "Label": i % 2, "id": i} for i in range(6)],
        [{"body": f"s {i}", "label": i % 3, "label_text": "abc"[i % 3]} for i in range(9)],
        [{"Text": f"s {i}", "label": str(i % 2), "title": "t"} for i in range(6)],
    ],
)
def test_labels_beside_the_only_text_are_learned_whatever_it_is_called(records):
    form = made(records).form
    assert form.kind == "template"
    assert form.completion == (" {label_text}" if "label_text" in records[0] else f" {{{list(records[0])[1]}}}")


@pytest.mark.parametrize(
    "labels", [["a"] * 6, ["a", "b", "c", "d", "e", "f"], [0.5, 0.1] * 3, [None] * 6, [True, False] * 3]
)
def test_a_label_that_is_no_closed_set_is_no_guess(labels):
    rows = made([{"text": "x", "label": label} for label in labels])
    assert rows.form.kind == "plain"
    assert rows.notes == ("columns not used: 'label'",)


def test_a_label_column_by_name_finds_its_text():
    records = [{"id": str(i), "review": f"r {i}", "stars": i % 2} for i in range(6)]
    form = made(records, label_column="stars").form
    assert (form.template, form.completion) == ("{review}\nStars:", " {stars}")
    named = made(with_columns(title="t"), label_column="label", text_column="title").form
    assert named.template == "{title}\nLabel:"
    with pytest.raises(DataError, match="has no column 'star'; did you mean 'stars'"):
        made(records, label_column="star")
    with pytest.raises(ConfigError, match="label_column and completion exclude each other"):
        made(records, label_column="stars", template="{review}", completion="{stars}")


def test_a_prompt_with_its_completion_is_learned_as_the_server_learns_it():
    rows = made([{"prompt": "2+2=", "completion": "4", "id": 1}])
    assert (rows.form.template, rows.form.completion) == ("{prompt}", "{completion}")
    assert rows.notes == (
        "learning to continue column 'prompt' with column 'completion'",
        "columns not used: 'id'",
    )


def test_messages_come_before_anything_else():
    assert made(with_columns(messages=[])).form.kind == "chat"


def test_columns_that_training_does_not_use_are_named_and_many_are_counted():
    assert made([{"text": "a", "author": "b", "year": 3}]).notes == ("columns not used: 'author', 'year'",)
    (note,) = made([{"text": "a", **{f"c{i}": i for i in range(20)}}]).notes
    assert note.endswith("'c6', 'c7' and 12 more")
    assert made([{"text": "a"}]).notes == ()
    labelled = made(with_columns(id=1), template="{text}", completion=" {label}")
    assert labelled.notes == ("columns not used: 'id'",)


def test_a_column_of_numbers_beside_a_text_is_no_second_text():
    assert made([{"": str(i), "quote": f"q {i}"} for i in range(3)]).column == "quote"
    assert made([{"n": str(i)} for i in range(3)]).column == "n"


def test_a_validation_file_is_read_in_the_form_guessed_for_training(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    few = [{"text": "other", "label": "good"}]  # alone they would be no closed set of labels
    split = split_rows(DataConfig(data=write("a.jsonl", REVIEWS), validation=write("b.jsonl", few)))
    assert split.validation.form == split.train.form
    assert split.train.form.labels == (" bad", " good")


def test_a_form_that_is_given_is_read_instead_of_a_guess(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    config = DataConfig(data=str(path))
    plain = rows_from_records(REVIEWS, text_column="text").form
    template = rows_from_records(REVIEWS, template=r"\\n {text}", completion=" {label}").form
    assert read_rows(config, form=plain).form.kind == "plain"
    assert read_rows(config, form=template).form == template, "a backslash in it is not read as typed again"
