"""Keys that say what is learned: honoured, or refused by row and message; never dropped in silence."""

import json

import pytest
from test_data_chat import CHATML, MARKED, targets, with_template

from softprompt.config import DataConfig
from softprompt.data import build_examples, read_rows, render_rows, rows_from_records, rows_hash
from softprompt.errors import DataError
from softprompt.evaluation.scores import questions_of
from softprompt.server.jobs.files_rows import check_rows


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def chat(*answers):
    return {"messages": [turn for answer in answers for turn in ({"role": "user", "content": "what?"}, answer)]}


def made(base, *records):
    return build_examples(base, rows_from_records(records), eos=True, max_length=250)


@pytest.mark.parametrize("template", [None, CHATML, MARKED])
def test_a_message_of_weight_zero_is_no_target(byte_base, template):
    base = byte_base if template is None else with_template(byte_base, template)
    weighted, whole = chat(said("no", weight=0), said("the thing", weight=1)), chat(said("no"), said("the thing"))
    (one,), (other,) = made(base, weighted).examples, made(base, whole).examples
    assert one.ids == other.ids
    assert targets(base, other)[0].strip().startswith("no")
    assert targets(base, one) == targets(base, other)[1:]


@pytest.mark.parametrize("weight", [1, 1.0, None, float("nan")])
def test_a_weight_of_one_or_none_is_learned(byte_base, weight):
    rows = [rows_from_records([chat(said("a", **more))]) for more in ({}, {"weight": weight})]
    assert rows_hash(rows[0]) == rows_hash(rows[1])
    assert made(byte_base, chat(said("a", weight=weight))) == made(byte_base, chat(said("a")))


def test_a_row_without_a_learned_turn_is_skipped_and_a_set_of_them_refused(byte_base):
    nothing, something = chat(said("no", weight=0)), chat(said("yes"))
    assert made(byte_base, nothing, something).report.empty_rows == (0,)
    with pytest.raises(DataError, match=r"there is nothing to learn from: none of the 2 rows has a turn .* without"):
        made(byte_base, nothing, nothing)


def test_weights_are_refused_where_marks_do_not_match_turns(byte_base):
    twice = MARKED.replace("{{ message['content'] }}<|end|>{% endg", "{% endgeneration %}{% generation %}x{% endg", 1)
    with pytest.raises(DataError, match="row 1 of records: the chat template marks 4 spans for 2 turns"):
        made(with_template(byte_base, twice), chat(said("a", weight=0), said("b")))


def test_the_question_of_a_chat_ends_before_its_last_learned_turn(byte_base):
    rows = rows_from_records([chat(said("one"), said("two", weight=0))])
    assert questions_of(byte_base, rows).items[0].reference == "one"


REFUSED = {
    "half a weight": (chat(said("a", weight=0.5)), "message 2 (assistant) has the weight 0.5; it must be 0 (context"),
    "a weight of true": (chat(said("a", weight=True)), "message 2 (assistant) has the weight True"),
    "a weight as text": (chat(said("a", weight="0")), "message 2 (assistant) has the weight '0'"),
    "a user's weight": ({"messages": [{"role": "user", "content": "a", "weight": 0}, said("b")]}, "message 1 (user) "
                        "has a weight; only turns of the assistant"),
    "train": (chat(said("a", train=False)), "message 2 (assistant) has 'train' = False, which is not supported; use"),
    "mask": (chat(said("a", mask=1)), "message 2 (assistant) has 'mask' = 1"),
    "a strange key": (chat(said("a", drop_me=True)), "message 2 (assistant) has the unknown key 'drop_me'; a message"),
    "tool calls": (chat(said("", tool_calls=[{"id": "x"}])), "message 2 (assistant) has 'tool_calls': tools and their"),
    "a function call": (chat(said("", function_call={"name": "x"})), "message 2 (assistant) has 'function_call'"),
    "tools": ({**chat(said("a")), "tools": [{"type": "function"}]}, "has the key 'tools': tools and their calls"),
    "functions": ({**chat(said("a")), "functions": [{}]}, "has the key 'functions'"),
    "parallel tool calls": ({**chat(said("a")), "parallel_tool_calls": False}, "has the key 'parallel_tool_calls'"),
    "a row's weight": ({**chat(said("a")), "weight": 0}, "has 'weight' = 0, which would select what is learned"),
    "a row's mask": ({**chat(said("a")), "loss_mask": [0, 1]}, "has 'loss_mask' = [0, 1], which would select"),
    "a pair's weight": ({"prompt": "a", "completion": "b", "weight": 0}, "has 'weight' = 0, which would select"),
    "a text's train": ({"text": "a", "train": "false"}, "has 'train' = 'false', which would select"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_chooses_what_is_learned_is_refused_in_files_and_in_python(tmp_path, case):
    row, message = REFUSED[case]
    settings = {"template": "{prompt}", "completion": "{completion}"} if "prompt" in row else {}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2)
    for where, read in {
        "row 1 of records": lambda: render_rows(rows_from_records([row], **settings)),
        f"row 1 of {path}": lambda: render_rows(read_rows(DataConfig(data=str(path), **settings))),
        "line 1": lambda: check_rows(path),
    }.items():
        with pytest.raises(DataError) as refusal:
            read()
        assert where in str(refusal.value) and message in str(refusal.value)


def test_keys_of_metadata_are_accepted(byte_base):
    facts = {"name": "ann", "id": "7", "message_id": 3, "metadata": {"a": [1]}, "timestamp": "now", "tool_calls": []}
    row = {**chat(said("a", **facts)), "id": 5, "source": "x", "weight": 1, "train": True, "tools": None, "loss": None}
    assert made(byte_base, row) == made(byte_base, chat(said("a", **facts)))


def test_a_column_that_measures_or_is_read_may_have_any_name():
    row = {"weight": 70.5, "mask": "FFP2", "loss": "x", "text": "a"}
    assert len(rows_from_records([row], text_column="text")) == 1
    assert len(rows_from_records([{"weight": 0, "label": "light"}], template="{weight} kg", completion="{label}")) == 1
