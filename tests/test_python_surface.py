"""What someone sees who tries the package in a Python session: names, one-line values, sentences for mistakes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import softprompt
from softprompt import (
    SamplingConfig,
    SoftPrompt,
    TrainConfig,
    compare,
    generate,
    load_base,
    rows_from_records,
    rows_from_texts,
    train,
)
from softprompt.data import build_examples
from softprompt.engine import Request
from softprompt.types import PromptRecord, brief_repr

QUICK = TrainConfig(virtual_tokens=2, max_steps=1, reparameterisation="none")
LONGEST_LINE = 1_200  # characters


@pytest.fixture(scope="module")
def trained(tiny_llama):
    return train(tiny_llama, ["w5 w6 w7 " * 8] * 30, QUICK)


def test_dir_lists_the_public_names_and_nothing_else():
    assert [name for name in dir(softprompt) if not name.startswith("__")] == sorted(softprompt.__all__)


def test_every_value_is_one_line_without_its_tensors_and_lists(tiny_llama, trained):
    rows = rows_from_texts(["w5 w6 " * 40] * 30)
    request = Request(tuple(range(3, 90)), trained.prompt)
    answer = generate(tiny_llama, [request], SamplingConfig(max_new_tokens=5))[0]
    found = compare(tiny_llama, {"a": trained.prompt}, ["w5 w6 w7 " * 9], sampling=SamplingConfig(max_new_tokens=20))
    examples = build_examples(tiny_llama, rows, eos=True, max_length=90)
    values = [
        tiny_llama, trained, trained.prompt, trained.prompt.record, trained.plan, rows, examples, examples.examples[0],
        examples.report, request, answer, found, found.answered[0],
    ]  # fmt: skip
    for value in values:
        shown = repr(value)
        assert shown.startswith(f"{type(value).__name__}("), shown
        assert "\n" not in shown, shown
        assert "tensor(" not in shown, shown
        assert len(shown) < LONGEST_LINE, shown
    assert repr(trained.prompt) == (
        f"SoftPrompt(2 virtual tokens x {tiny_llama.hidden_size}, plain, base {tiny_llama.name!r}, "
        f"hash {trained.prompt.content_hash[:8]})"
    )
    assert repr(tiny_llama).startswith(f"Base({tiny_llama.name!r}, llama, ")
    assert str(answer) == answer.text


def test_a_prompt_without_a_record_has_a_repr_too():
    assert repr(SoftPrompt(torch.ones(3, 4))).startswith("SoftPrompt(3 virtual tokens x 4, plain, hash ")


def test_a_repr_leaves_defaults_out_and_shows_a_tensor_by_its_shape():
    @dataclasses.dataclass
    class Value:
        given: int
        tensor: torch.Tensor
        unset: int | None = None
        items: list[int] = dataclasses.field(default_factory=list)

    assert brief_repr(Value(1, torch.zeros(2, 3))) == "Value(given=1, tensor=tensor[2, 3])"
    assert (
        brief_repr(Value(1, torch.zeros(1), items=[1] * 9)) == "Value(given=1, tensor=tensor[1], items=[1, 1, 1, ...])"
    )
    assert repr(PromptRecord(base_name="x")) == "PromptRecord(base_name='x')"


class TestTrainTakesRowsInAnyShape:
    TEXTS = tuple(f"w5 w{i} w7" for i in range(6, 12))
    LABELS = ("w90", "w91") * 3

    def rows(self):
        return [{"text": text, "label": label} for text, label in zip(self.TEXTS, self.LABELS, strict=True)]

    def test_a_dataframe_a_data_set_an_arrow_table_and_dictionaries_train_alike(self, tiny_llama):
        import datasets
        import pandas
        import pyarrow

        rows = self.rows()
        made = train(tiny_llama, rows_from_records(rows), QUICK)
        assert made.prompt.record.form.labels == (" w90", " w91")
        shapes = [
            rows,
            iter(rows),
            pandas.DataFrame(rows),
            datasets.Dataset.from_list(rows),
            pyarrow.Table.from_pylist(rows),
        ]
        for data in shapes:
            found = train(tiny_llama, data, QUICK)
            assert found.prompt.content_hash == made.prompt.content_hash, type(data)
            assert any("labels in column 'label' (2: 'w90', 'w91')" in note for note in found.notes)

    def test_texts_in_a_column_and_an_iterator_train_as_a_list_does(self, tiny_llama):
        import pandas

        made = train(tiny_llama, self.TEXTS, QUICK).prompt.content_hash
        for data in (
            pandas.Series(list(self.TEXTS)),
            iter(self.TEXTS),
            pandas.DataFrame({"quote": self.TEXTS, "id": range(6)}),
        ):
            assert train(tiny_llama, data, QUICK).prompt.content_hash == made

    def test_validation_rows_are_read_in_the_form_of_the_training_rows(self, tiny_llama):
        found = train(tiny_llama, self.rows(), QUICK, validation=self.rows()[:1])
        assert found.validation_losses

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ("w5 w6", "the data is one text, 'w5 w6'; give a list of texts"),
            ({"text": ["a"]}, "the data is a dict with 'text'; give a list of them, one per row"),
            ([1, 2], "item 1 of the data is a int, 1; give texts, or dictionaries with named columns"),
            (["a", ("b", "c")], "item 2 of the data is a tuple, ('b', 'c'); "),
            (7, "the data is a int; give texts"),
            (None, "the data is a NoneType; give texts"),
            ([], "the data has no rows"),
            (["a", "b \ud83d"], "row 2 of the data holds half of a surrogate pair, which is no text"),
        ],
    )  # fmt: skip
    def test_data_that_is_no_set_of_rows_is_refused_in_a_sentence(self, tiny_llama, data, said):
        with pytest.raises(softprompt.SoftpromptError) as caught:
            train(tiny_llama, data, QUICK)
        assert str(caught.value).startswith(said)

    def test_a_dictionary_of_splits_is_refused_with_the_way_to_select_one(self, tiny_llama):
        import datasets

        splits = datasets.DatasetDict(train=datasets.Dataset.from_list(self.rows()))
        with pytest.raises(softprompt.SoftpromptError, match=r"is a DatasetDict with 'train'; give one of its splits"):
            train(tiny_llama, splits, QUICK)


class TestTextInTextOut:
    def test_a_text_is_answered_as_its_ids_are(self, tiny_llama, trained):
        texts = ["w5 w6", "w7 w8 w9"]
        few = SamplingConfig(max_new_tokens=4)
        for prompt in (None, trained.prompt):
            requests = [Request(tiny_llama.bos_ids + tiny_llama.encode(text), prompt) for text in texts]
            assert generate(tiny_llama, texts, prompt, few) == generate(tiny_llama, requests, few)

    def test_a_text_fills_the_template_that_its_prompt_was_trained_with(self, tiny_llama):
        rows = rows_from_records([{"text": f"w{i}", "label": f"w{90 + i % 2}"} for i in range(5, 11)])
        prompt = train(tiny_llama, rows, QUICK).prompt
        (by_text,) = generate(tiny_llama, ["w5"], prompt)
        (by_field,) = generate(tiny_llama, [{"text": "w5"}], prompt)
        (raw,) = generate(tiny_llama, [Request(tiny_llama.bos_ids + tiny_llama.encode("w5"), prompt)])
        assert by_text == by_field
        assert by_text.log_probs != raw.log_probs, "without the template the base reads something else"

    def test_settings_as_the_third_argument_are_accepted(self, tiny_llama):
        few = SamplingConfig(max_new_tokens=2)
        assert generate(tiny_llama, ["w5"], few) == generate(tiny_llama, ["w5"], sampling=few)
        with pytest.raises(softprompt.SoftpromptError, match="sampling is given twice"):
            generate(tiny_llama, ["w5"], few, few)

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ("w5 w6", "{name} is 'w5 w6'; it must be a list, for example ['w5 w6']"),
            ({"text": "w5"}, "{name} is {{'text': 'w5'}}; it must be a list, for example [{{'text': 'w5'}}]"),
            ([5], "item 1 of {name} is a int, 5; give a text"),
            (["w5", "\ud83d"], "item 2 of {name} holds half of a surrogate pair, which is no text"),
        ],
    )
    def test_one_input_instead_of_a_list_is_refused(self, tiny_llama, inputs, said):
        for name, call in (("requests", lambda: generate(tiny_llama, inputs)),
                           ("inputs", lambda: compare(tiny_llama, {}, inputs))):  # fmt: skip
            with pytest.raises(softprompt.SoftpromptError) as caught:
                call()
            assert str(caught.value).startswith(said.format(name=name))


class TestAnArgumentOfAnotherKind:
    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda base, prompt: train("embedded", ["w5"]), "base is 'embedded'; it must be a Base, load_base("),
            (lambda base, prompt: generate("embedded", ["w5"]), "base is 'embedded'; it must be a Base, load_base("),
            (lambda base, prompt: compare("embedded", {}), "base is 'embedded'; it must be a Base, load_base("),
            (lambda base, prompt: train(base, ["w5"], {"epochs": 1}), "config is {'epochs': 1}; it must be a Train"),
            (lambda base, prompt: generate(base, ["w5"], "coach"), "prompt is 'coach'; it must be a SoftPrompt, "),
            (lambda base, prompt: compare(base, {"a": "coach"}), "prompts['a'] is 'coach'; it must be a SoftPrompt"),
            (lambda base, prompt: compare(base, prompt), "prompts is SoftPrompt("),
            (lambda base, prompt: compare(base, [prompt]), "prompts is [SoftPrompt("),
            (lambda base, prompt: compare(base, {}, held_out=["w5"]), "held_out is ['w5']; it must be a mapping"),
            (lambda base, prompt: compare(base, {}, held_out={"a": ["w5"]}), "held_out['a'] is ['w5']; it must be"),
        ],
    )  # fmt: skip
    def test_an_argument_of_another_class_is_refused_with_an_expression_that_makes_one(
        self, tiny_llama, trained, call, said
    ):
        with pytest.raises(softprompt.SoftpromptError) as caught:
            call(tiny_llama, trained.prompt)
        assert str(caught.value).startswith(said)


def test_a_prompt_trained_on_a_folder_names_that_folder_as_its_base(tiny_llama, trained, tmp_path):
    """As the command line's do, so that PEFT and a reader find the base again."""
    tiny_llama.model.save_pretrained(tmp_path / "tiny")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "tiny")
    base = load_base(str(tmp_path / "tiny"), dtype="float32")
    record = train(base, ["w7 w8 w9"], QUICK).prompt.record
    assert (record.base_name, record.base_source) == ("tiny", str(tmp_path / "tiny"))
    assert trained.prompt.record.base_source is None
