import dataclasses

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from softprompt.data import build_examples, completion_ids, report_lines, rows_from_records, rows_from_texts, rows_hash
from softprompt.data.rows import labels_of
from softprompt.errors import DataError, LengthError

REVIEWS = [{"text": "a good film", "label": "positive"}, {"text": "a bad film", "label": "negative"}] * 2
FORM = {"template": "Review: {text}\nSentiment:", "completion": " {label}"}


def one(base, rows, eos=True, max_length=200):
    return build_examples(base, rows, eos=eos, max_length=max_length).examples[0]


def test_plain_text_counts_everything_but_bos(any_base):
    text = "the one thing"
    example = one(any_base, rows_from_texts([text]))
    end = () if any_base.eos_id is None else (any_base.eos_id,)
    assert example.ids == any_base.bos_ids + any_base.encode(text) + end
    assert example.num_special == len(any_base.bos_ids)
    assert example.target_mask == (False,) * len(any_base.bos_ids) + (True,) * (len(any_base.encode(text)) + len(end))
    assert example.has_eos == bool(end)
    assert not one(any_base, rows_from_texts([text]), eos=False).has_eos


def test_a_template_counts_the_completion_behind_the_ids_of_inference(any_base):
    example = one(any_base, rows_from_records(REVIEWS, **FORM))
    prompt = "Review: a good film\nSentiment:"
    before = any_base.bos_ids + any_base.encode(prompt)
    after = completion_ids(any_base, prompt, " positive") + (() if any_base.eos_id is None else (any_base.eos_id,))
    assert example.ids == before + after
    assert example.target_mask == (False,) * len(before) + (True,) * len(after)


def test_a_cut_text_has_no_eos_and_is_reported(llama_base):
    rows = rows_from_texts(["the one thing", "the one thing that should matter to you " * 5, "the"])
    made = build_examples(llama_base, rows, eos=True, max_length=30)
    cut = made.examples[1]
    assert len(cut.ids) == 30 and not cut.has_eos and cut.ids[-1] != llama_base.eos_id
    assert cut.ids == (llama_base.bos_ids + llama_base.encode(rows.records[1]["text"]))[:30]
    assert made.report.truncated_rows == (1,)
    assert made.examples[0].has_eos and made.examples[2].has_eos


def test_where_only_eos_does_not_fit_it_is_left_out(llama_base):
    length = len(llama_base.encode("the one")) + 1
    made = build_examples(llama_base, rows_from_texts(["the one"]), eos=True, max_length=length)
    assert not made.examples[0].has_eos and made.report.truncated_rows == (0,)
    made = build_examples(llama_base, rows_from_texts(["the one"]), eos=True, max_length=length + 1)
    assert made.examples[0].has_eos and made.report.truncated_rows == ()


def test_a_long_template_row_loses_the_prompts_beginning_and_keeps_the_completion(llama_base):
    rows = rows_from_records([{"text": "a good film " * 20, "label": "positive"}], **FORM)
    whole, cut = one(llama_base, rows, max_length=10_000), one(llama_base, rows, max_length=40)
    completion = [i for i, counted in zip(whole.ids, whole.target_mask, strict=True) if counted][:-1]
    assert [i for i, counted in zip(cut.ids, cut.target_mask, strict=True) if counted] == completion
    assert cut.ids == llama_base.bos_ids + whole.ids[:-1][-39:]
    assert not cut.has_eos
    only_completion = one(llama_base, rows, max_length=3)
    assert only_completion.ids == (*llama_base.bos_ids, *completion[:2]) and sum(only_completion.target_mask) == 2


def test_empty_rows_are_skipped_and_reported(any_base):
    made = build_examples(any_base, rows_from_texts(["", "the thing", " \n "]), eos=True, max_length=50)
    assert [example.row for example in made.examples] == [1]
    assert made.report.empty_rows == (0, 2)
    assert (made.report.num_read, made.report.num_used) == (3, 1)


def test_rows_keep_the_index_of_their_source(byte_base):
    rows = rows_from_texts(["a", "b", "c"]).select([2, 0])
    assert [example.row for example in build_examples(byte_base, rows, eos=True, max_length=9).examples] == [2, 0]


def test_nothing_left_is_one_sentence(byte_base):
    with pytest.raises(DataError, match=r"^texts: all 2 rows are empty \(column 'text'\); there is nothing to learn"):
        build_examples(byte_base, rows_from_texts(["", " "]), eos=True, max_length=9)
    rows = rows_from_records([{"text": "x", "label": ""}], **FORM)
    with pytest.raises(DataError, match=r"^records: all 1 rows are empty \(completion ' \{label\}'\)"):
        build_examples(byte_base, rows, eos=True, max_length=9)


def test_no_room_for_text_is_refused(llama_base):
    with pytest.raises(LengthError, match="max_length is 1 tokens; no text fits behind the soft prompt"):
        build_examples(llama_base, rows_from_texts(["a"]), eos=True, max_length=1)


def test_an_id_that_the_base_does_not_embed_names_row_and_token(byte_base):
    config = GPT2Config(vocab_size=100, n_positions=256, n_embd=8, n_layer=1, n_head=1)
    small = dataclasses.replace(byte_base, name="small", model=GPT2LMHeadModel(config))
    with pytest.raises(DataError, match=r"row 2 of texts: token '.+' has id \d+, but base 'small' embeds ids below"):
        build_examples(small, rows_from_texts(["!", "é"]), eos=False, max_length=50)


def test_labels_are_a_closed_set_of_completions(byte_base):
    made = build_examples(byte_base, rows_from_records(REVIEWS, **FORM), eos=True, max_length=200)
    assert made.form.labels == (" negative", " positive")
    assert labels_of(["a", "b", "a"]) == ()  # fewer than two rows a label
    assert labels_of(["a"] * 9) == ()  # one word is no choice
    assert labels_of([str(i % 51) for i in range(200)]) == ()
    assert len(labels_of([str(i % 50) for i in range(200)])) == 50


def test_the_hash_is_of_the_text_in_order(byte_base, llama_base):
    rows = rows_from_texts(["a", "b"])
    hashes = {build_examples(base, rows, eos=True, max_length=9).data_hash for base in (byte_base, llama_base)}
    assert hashes == {rows_hash(rows)}
    assert rows_hash(rows_from_texts(["ab", ""])) != rows_hash(rows_from_texts(["a", "b"]))
    assert rows_hash(rows.select([1, 0])) != rows_hash(rows)


def test_the_report_says_what_was_read(llama_base):
    rows = rows_from_texts(["the thing", "", *["the one thing that should matter " * 4] * 7])
    made = build_examples(llama_base, rows, eos=True, max_length=20)
    lines = report_lines(made.report)
    tokens = sum(len(example.ids) for example in made.examples)
    assert lines[0].startswith(f"texts: 8 of 9 rows used, {tokens} tokens (")
    assert lines[0].endswith(f"20 a row), {tokens - 8} of them counted")
    assert lines[1] == "skipped, nothing to learn: 1 row (row 2)"
    assert lines[2] == "cut at the length limit, without EOS: 7 rows (row 3, 4, 5, 6, 7 and 2 more)"
    assert lines[3] == "as the model sees it (⟦counted⟧): [soft prompt]<s>⟦ the thing</s>⟧"
    long = dataclasses.replace(made.report, example="x" * 5_000)
    assert len(report_lines(long)[-1]) < 700


def test_the_example_shows_the_prompt_uncounted(byte_base):
    made = build_examples(byte_base, rows_from_records(REVIEWS, **FORM), eos=True, max_length=200)
    assert made.report.example == "[soft prompt]Review: a good film\nSentiment:⟦ positive<|endoftext|>⟧"


def walked(base, prompt, own, labels):
    """The ids of the labels that begin as the row's own, behind its prompt, at each of its ids, and at its end."""
    end = () if base.eos_id is None else (base.eos_id,)
    paths = [completion_ids(base, prompt, label) + end for label in labels]
    path = completion_ids(base, prompt, own) + end
    return [
        {other[i] for other in paths if other[: i + 1][:-1] == path[:i] and i < len(other)} for i in range(len(path))
    ]


@pytest.mark.parametrize("template", ["Review: {text}\nSentiment:", "{text} "])
def test_branches_are_where_labels_differ_behind_each_rows_own_prompt(any_base, template):
    labels = ("positive", "pos", "negative", "neither")
    rows = [{"text": f"a {word} film", "label": label} for label in labels for word in ("good", "bad")]
    completion = " {label}" if template.endswith(":") else "{label}"
    made = build_examples(
        any_base, rows_from_records(rows, template=template, completion=completion), eos=True, max_length=200
    )
    for row, example in zip(rows, made.examples, strict=True):
        prompt = template.format(text=row["text"])
        first = len(any_base.bos_ids) + len(any_base.encode(prompt))
        nodes = walked(any_base, prompt, completion.format(**row), made.form.labels)
        expected = [(first + i, tuple(sorted(ids))) for i, ids in enumerate(nodes) if len(ids) > 1]
        assert [tuple(branch) for branch in example.branches] == expected != []
        assert all(example.ids[column] in ids for column, ids in example.branches)
    assert not any(
        each.branches for each in build_examples(any_base, rows_from_texts(["a", "b"]), eos=True, max_length=9).examples
    )
