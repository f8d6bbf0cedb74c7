"""Rows of an encoder-decoder: what its encoder reads, and what its decoder is to write."""

import pytest
from support.material import chat, sentence
from support.seq2seq_bases import EOS, FAMILIES, LANGUAGE, PAD, build_seq2seq

from softprompt.data import build_examples, form_ids, report_lines, rows_from_records, rows_from_texts
from softprompt.data.tokens import completion_ids, target_ids
from softprompt.errors import DataError
from softprompt.types import InputForm

FORM = {"template": "w5 {text} w6", "completion": " {answer}"}
ROWS = [{"text": "w7 w8", "answer": "w9"}, {"text": "w10", "answer": "w11 w12 w13"}]


def examples_of(base, records=ROWS, max_length=40, eos=True, **form):
    return build_examples(base, rows_from_records(records, **(form or FORM)), eos=eos, max_length=max_length)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_and_decoder_have_the_ids_that_the_tokenizer_itself_gives(family):
    """`text_target` as transformers' own recipes use it: what stands before a target is the decoder's beginning."""
    base = build_seq2seq(family)
    for example, row in zip(examples_of(base).examples, ROWS, strict=True):
        assert list(example.source) == base.tokenizer(f"w5 {row['text']} w6")["input_ids"]
        labels = base.tokenizer(text_target=row["answer"])["input_ids"]
        if family == "mbart":  # the language behind EOS is what transformers shifts to the decoder's start
            assert labels.pop() == base.decoder_start_id == LANGUAGE
        assert [*base.decoder_start_ids[1:], *example.ids] == labels
        assert all(example.target_mask) and example.has_eos and example.num_special == 0


def test_what_stands_before_every_target_is_the_decoders_start():
    starts = {family: build_seq2seq(family).decoder_start_ids for family in FAMILIES}
    assert starts["t5"] == starts["pegasus"] == (PAD,)
    assert starts["bart"] == (EOS, 1)
    assert starts["mbart"] == (LANGUAGE,)
    assert starts["mbart50"] == (EOS, LANGUAGE)


def test_the_space_that_separates_a_completion_from_a_prompt_is_left_out():
    base = build_seq2seq()
    assert completion_ids(base, "w7", " w9") == target_ids(base, "w9") == (9,)
    assert base.encode("w7 w9") != (9,)


def test_an_input_is_what_the_encoder_read_in_training():
    base = build_seq2seq("bart")
    form = InputForm(kind="template", **FORM)
    assert form_ids(base, form, {"text": "w7 w8"}) == examples_of(base).examples[0].source
    assert form_ids(base, None, "w7 w8") == (1, 7, 8, EOS)
    messages = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    (example,) = examples_of(base, [{"messages": messages}], messages_column="messages").examples
    assert form_ids(base, InputForm(kind="chat"), messages[:1]) == example.source
    assert example.ids == (9, EOS)


def test_of_a_chat_the_last_turn_to_learn_is_written_and_the_rest_before_it_read():
    base = build_seq2seq()
    turns = [*chat(1)["messages"], *chat(2)["messages"], {"role": "assistant", "content": "w90", "weight": 0}]
    (example,) = examples_of(base, [{"messages": turns}], max_length=400, messages_column="messages").examples
    assert example.ids == (*base.encode(turns[3]["content"]), EOS)
    assert example.source == form_ids(base, InputForm(kind="chat"), turns[:3])


def test_each_side_is_cut_to_the_limit_by_itself():
    base = build_seq2seq("bart")
    long, short = " ".join(["w7"] * 30), "w9"
    rows = [{"text": long, "answer": short}, {"text": short, "answer": long}, {"text": short, "answer": short}]
    found = examples_of(base, rows, max_length=10)
    first, second, third = found.examples
    assert first.source == (1, 5, 7, 7, 7, 7, 7, 7, 7, EOS) and first.ids == (9, EOS) and first.has_eos
    assert second.ids == (7,) * 9 and not second.has_eos  # with its two start tokens the decoder reads ten
    assert third.source == (1, 5, 9, 6, EOS)
    assert found.report.truncated_rows == (1,) and found.report.truncated_sources == (0,)
    lines = report_lines(found.report)
    assert any("without EOS: 1 row (row 2)" in line for line in lines)
    assert any("read up to the length limit only: 1 row (row 1)" in line for line in lines)


def test_a_chat_that_is_too_long_keeps_its_end():
    base = build_seq2seq()
    turns = [{"role": "user", "content": sentence(3, 30, 40)}, {"role": "assistant", "content": "w9"}]
    (example,) = examples_of(base, [{"messages": turns}], max_length=12, messages_column="messages").examples
    whole = form_ids(base, InputForm(kind="chat"), turns[:1])
    assert len(whole) > 12 and example.source == whole[-12:]


def test_branches_lie_in_the_targets_the_first_one_included():
    base = build_seq2seq()
    records = [{"text": "w7", "answer": f"w{40 + i % 2} w50"} for i in range(4)]
    first = examples_of(base, records).examples[0]
    assert [tuple(branch) for branch in first.branches] == [(0, (40, 41))]
    longer = [{"text": "w7", "answer": "w40" + " w50" * (i % 2)} for i in range(4)]
    assert [tuple(branch) for branch in examples_of(base, longer).examples[0].branches] == [(1, (EOS, 50))]


def test_the_reported_loss_covers_the_first_target_too():
    base = build_seq2seq()
    assert examples_of(base).examples[1].text_mask == (True, True, True, False)


def test_without_eos_the_target_ends_with_its_text():
    assert examples_of(build_seq2seq(), eos=False).examples[0].ids == (9,)


def test_plain_texts_are_refused_since_there_is_nothing_to_read():
    rows = rows_from_texts(["w7 w8"])
    with pytest.raises(DataError, match=r"encoder-decoder, which reads one text and writes another.*--template"):
        build_examples(build_seq2seq(), rows, eos=True, max_length=40)


def test_an_example_is_shown_from_what_is_read_to_what_is_written():
    shown = examples_of(build_seq2seq()).report.example
    assert shown == "[soft prompt]w5 w7 w8 w6 </s> → <unk>⟦w9 </s>⟧"


def test_the_report_counts_the_tokens_of_both_sides():
    report = examples_of(build_seq2seq()).report
    assert (report.num_tokens, report.num_targets, report.min_tokens, report.max_tokens) == (15, 6, 7, 8)
