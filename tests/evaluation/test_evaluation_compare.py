"""`compare`: what it asks, what it refuses, and that its figures survive as JSON and Markdown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from support.tiny_bases import build_base, random_prompt

from softprompt.config import SamplingConfig
from softprompt.data import input_ids, rows_from_records, rows_from_texts
from softprompt.data.rows import with_labels
from softprompt.engine import Request, generate
from softprompt.errors import ConfigError, DataError, LengthError
from softprompt.evaluation import Comparison, InputAnswers, compare, to_markdown
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord

SHORT = SamplingConfig(max_new_tokens=5, repetition_penalty=1.5)
TEMPLATE = InputForm(kind="template", template="w5 {text}", completion=" {label}")


def soft(base, seed=0, form=None, length=4):
    return SoftPrompt(random_prompt(base, length, seed), PromptRecord(form=form or InputForm()))


def test_the_answers_of_a_comparison_are_those_of_each_prompt_alone(tiny_llama):
    """Twelve prompts and three inputs make several batches."""
    prompts = {f"p{seed}": soft(tiny_llama, seed, length=1 + seed % 5) for seed in range(12)}
    inputs = ["w5 w6", "w7", "w8 w9 w10 w11"]
    found = compare(tiny_llama, prompts, inputs, sampling=SHORT)
    for item, text in zip(found.answered, inputs, strict=True):
        assert list(item.answers) == [None, *prompts]
        for name, answer in item.answers.items():
            request = Request(input_ids(tiny_llama, text=text), prompts[name] if name is not None else None)
            assert answer == generate(tiny_llama, [request], SHORT)[0].text
    assert len({item.answers["p1"] for item in found.answered} | {item.answers["p2"] for item in found.answered}) > 3


def test_fields_go_through_each_prompts_own_template_and_the_first_one_for_the_base(tiny_llama):
    other = replace(TEMPLATE, template="w50 w51 {text}")
    prompts = {"one": soft(tiny_llama, 0, TEMPLATE), "two": soft(tiny_llama, 0, other)}
    (item,) = compare(tiny_llama, prompts, [{"text": "w9"}], sampling=SHORT).answered
    (raw,) = compare(tiny_llama, prompts, ["w5 w9"], sampling=SHORT, raw=True).answered
    (raw_two,) = compare(tiny_llama, prompts, ["w50 w51 w9"], sampling=SHORT, raw=True).answered
    assert item.input == "text=w9"
    assert item.answers == {None: raw.answers[None], "one": raw.answers["one"], "two": raw_two.answers["two"]}
    (text,) = compare(tiny_llama, prompts, ["w9"], sampling=SHORT).answered
    assert text.answers == item.answers
    (messages,) = compare(tiny_llama, prompts, [[{"role": "user", "content": "w9"}]], sampling=SHORT).answered
    assert messages.answers == item.answers
    assert messages.input == "user: w9"


def test_only_sets_with_labels_have_an_accuracy(tiny_llama):
    records = [{"text": f"w{7 + i}", "label": f"w{90 + i % 2}"} for i in range(6)]
    labelled = with_labels(rows_from_records(records, template="w5 {text}", completion=" {label}"))
    sets = {"texts": rows_from_texts(["w5 w6", "w7 w8 w9"]), "labels": labelled}
    found = compare(tiny_llama, {"p": soft(tiny_llama)}, held_out=sets)
    assert [(item.held_out, item.prompt) for item in found.losses] == [
        ("texts", None), ("texts", "p"), ("labels", None), ("labels", "p"),
    ]  # fmt: skip
    assert [(item.held_out, item.prompt) for item in found.accuracies] == [("labels", None), ("labels", "p")]
    assert found.prompt_bytes == 4 * 16 * 4
    assert found.base_bytes == tiny_llama.num_parameters * 4
    assert found.peak_bytes > found.base_bytes


def test_rows_are_cut_alike_for_all_whatever_each_prompts_length(tiny_llama):
    """Else a long prompt would be read on fewer tokens than the base."""
    long = " ".join(["w5 w6 w7"] * 40)
    prompts = {"short": soft(tiny_llama, length=1), "long": soft(tiny_llama, length=50)}
    found = compare(tiny_llama, prompts, held_out={"set": rows_from_texts([long, "w5 w6"])})
    assert {item.num_tokens for item in found.losses} == {46 - 1 + 2}


class TestRefusals:
    def test_an_empty_input_without_bos_is_refused(self, tiny_gpt2):
        with pytest.raises(DataError, match="an empty text has no token to continue from"):
            compare(tiny_gpt2, {"p": soft(tiny_gpt2)}, [""])

    def test_an_empty_input_with_bos_is_answered(self, tiny_llama):
        assert compare(tiny_llama, {"p": soft(tiny_llama)}, [""], sampling=SHORT).answered

    def test_a_prompt_named_base_is_refused(self, tiny_llama):
        with pytest.raises(ConfigError, match="is called 'base'"):
            compare(tiny_llama, {"base": soft(tiny_llama)}, ["w5"])

    def test_an_input_or_a_prompt_longer_than_the_context_is_refused(self, tiny_llama):
        with pytest.raises(LengthError, match="maximum context length is 96 tokens"):
            compare(tiny_llama, {"p": soft(tiny_llama)}, ["w5 " * 90])
        with pytest.raises(LengthError, match="no text fits"):
            compare(tiny_llama, {"p": soft(tiny_llama, length=95)}, held_out={"set": rows_from_texts(["w5 w6"])})

    def test_fields_for_a_prompt_without_a_template_are_refused(self, tiny_llama):
        with pytest.raises(DataError, match="no template"):
            compare(tiny_llama, {"p": soft(tiny_llama)}, [{"text": "w5"}])


def test_json_is_strict_even_for_figures_that_are_nan():
    base = build_base("gpt2")
    found = compare(base, {"p": soft(base)}, held_out={"set": rows_from_texts(["w5", "w6"])})
    record = found.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["losses"][0]["loss"] is None
    assert record["losses"][0]["perplexity"] is None


HOSTILE = [
    "a | b || c", "\\| \\\\| \\", "# heading", "- item\n\n1. other", "<script>alert(1)</script>", "<!-- hidden",
    "[click](javascript:x)", "![x](http://example.org/y.png)", "`code` ``` fence\n```\nmore", "*bold* _em_ ~~no~~",
    "&amp; &#60;b&#62;", "| --- |", "https://example.org www.example.org", "line\r\nother\x0b\x0cend", "$x$ @you",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_markdown_shows_hostile_answers_as_text(hostile):
    found = Comparison(
        base_name=hostile, prompts={"p": 4}, answered=(InputAnswers(hostile, {None: hostile, hostile: "fine"}),),
        losses=(), accuracies=(), base_bytes=1, prompt_bytes=1, peak_bytes=1,
    )  # fmt: skip
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(to_markdown(found))
    kinds = [token.type for token in tokens]
    assert (kinds.count("tr_open"), kinds.count("td_open"), kinds.count("heading_open")) == (3, 4, 2)
    assert {
        token.type for token in tokens if "html" in token.type or "list" in token.type or "fence" in token.type
    } == set()
    children = [child for token in tokens if token.children for child in token.children]
    assert {child.type for child in children} <= {"text", "text_special"}
    cells = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert cells.count(" ".join(hostile.split())) == 2
    assert "https://" not in to_markdown(found)
