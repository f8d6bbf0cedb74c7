import pytest

from softprompt.data import build_examples, chat_prompt_ids, input_ids, prompt_text, rows_from_records
from softprompt.errors import DataError
from softprompt.types import InputForm

FORM = InputForm(kind="template", template="Review: {text}\nSentiment:", completion=" {label}")
USER = [{"role": "user", "content": "a good film"}]


def test_training_and_inference_write_the_same_prompt(any_base):
    rows = rows_from_records([{"text": "a good film", "label": "x"}], template=FORM.template, completion=" {label}")
    made = build_examples(any_base, rows, eos=True, max_length=200)
    ids = input_ids(any_base, made.form, fields={"text": "a good film"})
    assert made.examples[0].ids[: len(ids)] == ids
    assert made.examples[0].target_mask[len(ids) :] and not any(made.examples[0].target_mask[: len(ids)])
    assert ids == any_base.bos_ids + any_base.encode("Review: a good film\nSentiment:")


def test_raw_text_is_encoded_unchanged(any_base):
    for form in (None, FORM, InputForm(kind="chat")):
        assert input_ids(any_base, form, text="a\nb") == any_base.bos_ids + any_base.encode("a\nb")
    assert input_ids(any_base, text="") == any_base.bos_ids  # "" is a text


def test_messages_are_encoded_in_the_form_of_the_prompt(byte_base):
    chat = chat_prompt_ids(byte_base, USER)
    for form in (None, InputForm(kind="chat")):
        assert input_ids(byte_base, form, messages=USER) == chat
    history = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "yes"}, *USER]
    assert input_ids(byte_base, FORM, messages=history) == input_ids(byte_base, FORM, fields={"text": "a good film"})
    assert input_ids(byte_base, InputForm(), messages=history) == input_ids(byte_base, text="a good film")


@pytest.mark.parametrize(
    ("form", "given", "message"),
    [
        (FORM, {}, "an input is one of text, fields or messages; given: none"),
        (FORM, {"text": "", "fields": {}}, "an input is one of text, fields or messages; given: text, fields"),
        (FORM, {"fields": {"txt": "a"}}, r"asks for 'text'; did you mean 'txt'\? the columns are 'txt'"),
        (FORM, {"fields": {"text": "a", "b": "c"}}, "there is no field 'b' in template .*; it has 'text'"),
        (FORM, {"fields": {"text": 3}}, "field 'text' must be text, not a int"),
        (InputForm(), {"fields": {"text": "a"}}, "fields 'text' need a template, but this prompt was trained on plain"),
        (None, {"fields": {"text": "a"}}, "fields 'text' need a template, but the bare base has no template"),
        (None, {"messages": []}, "messages is empty"),
        (None, {"messages": [{"role": "user"}]}, "messages, message 1 .user. has content that is no string"),
        (FORM, {"messages": [{"role": "system", "content": "a"}]}, "messages has no user message"),
        (InputForm(kind="template", template="{a}{b}", completion="{c}"), {"messages": USER}, "fills one field, but"),
    ],
)
def test_an_input_that_does_not_suit_the_form_is_refused(byte_base, form, given, message):
    with pytest.raises(DataError, match=message):
        input_ids(byte_base, form, **given)


def test_prompt_text_is_the_filled_template():
    assert prompt_text(FORM, {"text": "{x}"}) == "Review: {x}\nSentiment:"
