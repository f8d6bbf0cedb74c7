import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.base import Base
from softprompt.data import completion_ids, label_ids
from softprompt.data.tokens import adds_space, continuation_ids

TEXT = st.text(alphabet="aegt .,\n-é1", max_size=12)
reuse = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decoded(base: Base, ids) -> str:
    return base.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


@reuse
@given(prompt=TEXT, completion=TEXT)
def test_byte_level_ids_join_to_the_joined_text(byte_base, prompt, completion):
    ids = byte_base.encode(prompt) + completion_ids(byte_base, prompt, completion)
    assert decoded(byte_base, ids) == prompt + completion


@reuse
@given(prompt=TEXT.map("a".__add__), completion=TEXT)
def test_sentencepiece_ids_join_to_the_joined_text_without_an_added_space(llama_base, prompt, completion):
    ids = llama_base.encode(prompt) + completion_ids(llama_base, prompt, completion)
    assert decoded(llama_base, ids) == prompt + completion


@reuse
@given(prompt=TEXT, completion=TEXT)
def test_the_joined_ids_are_used_wherever_they_start_with_the_prompts(any_base, prompt, completion):
    before, joined = any_base.encode(prompt), any_base.encode(prompt + completion)
    ids = before + completion_ids(any_base, prompt, completion)
    assert ids == joined or joined[: len(before)] != before


def test_a_join_that_changes_the_prompt_leaves_the_prompt_alone(byte_base):
    prompt, completion = "Sentiment: ", "positive"
    joined = byte_base.encode(prompt + completion)
    assert joined[: len(byte_base.encode(prompt))] != byte_base.encode(prompt)  # the space fuses into the word
    assert completion_ids(byte_base, prompt, completion) == byte_base.encode("positive")


@pytest.mark.parametrize("name", ["llama_base", "real_llama", "spaced_byte_base"])
def test_a_tokenizer_that_adds_a_space_adds_none_to_a_completion(name, request):
    base = request.getfixturevalue(name)
    assert adds_space(base)
    ids = continuation_ids(base, "positive")
    assert ids != base.encode("positive")
    assert decoded(base, base.encode("a") + ids) == decoded(base, base.encode("a")) + "positive"


@pytest.mark.parametrize("name", ["byte_base", "word_base"])
def test_other_tokenizers_continue_as_they_begin(name, request):
    base = request.getfixturevalue(name)
    assert not adds_space(base)
    assert continuation_ids(base, "positive") == base.encode("positive")


def test_a_label_has_no_end_and_no_beginning(llama_base):
    ids = label_ids(llama_base, "Sentiment:", " positive")
    assert not {llama_base.eos_id, *llama_base.bos_ids} & set(ids)
    assert llama_base.encode("Sentiment:") + ids == llama_base.encode("Sentiment: positive")


@pytest.mark.parametrize("text", ["Hello </s> there", "<s>", "<|endoftext|>", "a<unk>b"])
def test_a_special_token_written_in_a_text_is_text(any_base, text):
    special = set(any_base.tokenizer.all_special_ids) - {any_base.tokenizer.unk_token_id}
    assert not special & set(any_base.encode(text))
