"""Rows of other tasks than generation: what a base does with them, and what its head reads of them, id by id."""

from __future__ import annotations

import json

import pytest
from support.encoders import build_encoder
from support.tiny_bases import build_base

from softprompt.config import DataConfig, TrainConfig
from softprompt.data import (
    build_task_examples,
    read_rows,
    report_lines,
    rows_from_records,
    rows_hash,
    split_rows,
    task_inputs,
    with_task,
)
from softprompt.errors import ConfigError, DataError, LengthError

REVIEWS = [{"text": f"w{20 + i} w{30 + i}", "label": ("bad", "good")[i % 2]} for i in range(6)]
CLOZE = {"template": "{text} w9 [MASK] w8", "completion": " {label}"}
TAGGED = [{"tokens": [f"w{20 + i}", "w40"], "ner_tags": ["O", ("PER", "LOC")[i % 2]]} for i in range(4)]
QUESTIONS = [
    {"question": "w50", "context": f"w20 w21 w{30 + i} w22", "answers": {"text": [f"w{30 + i}"], "answer_start": [8]}}
    for i in range(4)
]
PAIRS = [{"anchor": f"w{20 + i}", "positive": f"w{30 + i}", "negative": f"w{40 + i}"} for i in range(3)]


@pytest.fixture(scope="module")
def bert():
    return build_encoder("bert", words=["bad", "good"])


@pytest.fixture(scope="module")
def bare():
    return build_encoder("distilbert", part="bare")


def built(base, records, config=None, max_length=40, **columns):
    config = config or TrainConfig()
    rows = with_task(rows_from_records(records, task=config.task, **columns), base, config)
    return build_task_examples(base, rows, max_length=max_length)


def tokens(base, example):
    return base.tokenizer.convert_ids_to_tokens(list(example.ids))


class TestTask:
    """What `auto` is, by base and columns."""

    @pytest.mark.parametrize(
        ("records", "columns", "task"),
        [
            (REVIEWS, {}, "classify"),
            (REVIEWS, {"label_column": "label"}, "classify"),
            (REVIEWS, CLOZE, "cloze"),
            (REVIEWS, {"template": "{text} w9 <mask>", "label_column": "label"}, "cloze"),
            (TAGGED, {}, "tag"),
            ([{"tokens": r["tokens"], "tags": [1, 2], "id": "7"} for r in TAGGED], {}, "tag"),
            (TAGGED, {"text_column": "tokens", "label_column": "ner_tags"}, "tag"),
            (QUESTIONS, {}, "answer"),
            ([{"question": "a", "context": "b", "answer": "b"}] * 2, {}, "answer"),
            (PAIRS, {}, "embed"),
            ([{"sentence1": "a", "sentence2": "b"}] * 2, {}, "embed"),
        ],
    )
    def test_an_encoder_does_what_the_columns_are_called_for(self, bert, records, columns, task):
        form = with_task(rows_from_records(records, **columns), bert, TrainConfig()).form
        assert (form.task, form.placement) == (task, "after-cls")

    @pytest.mark.parametrize("records", [REVIEWS, ["w5 w6"], [{"prompt": "w5", "completion": "w6"}]])
    def test_a_causal_base_generates(self, records):
        rows = rows_from_records(records)
        assert with_task(rows, build_base("gpt2"), TrainConfig()) == rows

    def test_a_causal_base_reads_columns_that_are_no_text_with_a_head(self):
        form = with_task(rows_from_records(TAGGED), build_base("gpt2"), TrainConfig()).form
        assert (form.task, form.placement) == ("tag", "front")

    def test_rows_of_an_encoder_resolved_again_stay_as_they_are(self, bert):
        for records, columns in ((REVIEWS, {}), (REVIEWS, CLOZE), (TAGGED, {}), (QUESTIONS, {}), (PAIRS, {})):
            rows = with_task(rows_from_records(records, **columns), bert, TrainConfig())
            assert with_task(rows, bert, TrainConfig()) == rows

    def test_a_text_with_its_label_loses_the_words_of_generation(self, bert):
        rows = with_task(rows_from_records(REVIEWS), bert, TrainConfig())
        assert (rows.form.template, rows.form.completion) == ("{text}", "{label}")
        assert rows.form.labels == ("bad", "good")
        assert rows.notes == ("texts in column 'text', labels in column 'label'",)

    @pytest.mark.parametrize(
        ("base", "task", "pooling"),
        [
            ("bert", "classify", "cls"),
            ("bert", "embed", "mean"),
            ("gpt2", "classify", "last"),
            ("bert", "tag", None),
            ("sentences", "classify", "mean"),
        ],
    )
    def test_pooling_goes_by_base_and_task(self, bert, base, task, pooling):
        records = {"classify": REVIEWS, "embed": PAIRS, "tag": TAGGED}[task]
        if base == "sentences":  # BERT without its head for masked words
            base = build_encoder("bert", part="bare")
        else:
            base = bert if base == "bert" else build_base(base)
        assert with_task(rows_from_records(records), base, TrainConfig(task=task)).form.pooling == pooling

    def test_labels_that_are_whole_numbers_are_in_their_order_however_many(self, bert):
        records = [{"text": f"w{9 + i % 80}", "label": i % 60} for i in range(60)]
        form = with_task(rows_from_records(records, label_column="label"), bert, TrainConfig(task="classify")).form
        assert form.labels == tuple(map(str, range(60)))


class TestRefusals:
    """What a base or a set cannot do is refused by name."""

    @pytest.mark.parametrize(
        ("base", "records", "columns", "config", "message"),
        [
            ("bert", ["w5"], {}, {}, "is an encoder, which writes no text, and records is read as plain text"),
            ("bert", REVIEWS, {}, {"task": "generate"}, "is an encoder, which writes no text; use task classify"),
            ("bert", [{"prompt": f"w{i}", "completion": f"w{i}"} for i in range(9)], {}, {}, "are no set of labels"),
            ("bare", REVIEWS, CLOZE, {}, "base 'tiny-distilbert' has no masked-LM head .* use task classify"),
            ("gpt2", REVIEWS, CLOZE, {"task": "cloze"}, "base 'tiny-gpt2' is causal; use task generate"),
            ("bert", REVIEWS, {}, {"task": "tag"}, "task 'tag' needs a column with lists of words"),
            ("bert", TAGGED, {}, {"task": "classify"}, "task 'classify' needs a text and a label column"),
            ("gpt2", TAGGED, {}, {"task": "generate"}, "needs text, and records is read for task 'tag'"),
            ("bert", REVIEWS, {}, {"task": "cloze"}, r"needs a mask in the template, .* write '.*Label: \[MASK\]\.'"),
            ("bert", REVIEWS, {**CLOZE, "template": "[MASK] {text} <mask>"}, {}, "has several masks"),
            ("bert", REVIEWS, CLOZE, {"pooling": "mean"}, "task 'cloze' reads its own columns"),
            ("bert", REVIEWS, {}, {"label_words": ("good=w5",)}, "are for task cloze"),
            ("gpt2", REVIEWS, {}, {"placement": "after-cls"}, "base 'tiny-gpt2' is no encoder; use placement front"),
            ("gpt2", REVIEWS, {}, {"task": "classify", "pooling": "cls"}, r"has no \[CLS\] that sees the text"),
            ("bert", REVIEWS, {}, {"pooling": "peft", "placement": "after-cls"}, "use placement front with it"),
            ("bert", REVIEWS, {}, {"decoder_prompt": True}, "decoder_prompt is for encoder-decoders"),
            ("bert", [{"text": "w9", "label": "a"}] * 4, {"label_column": "label"}, {"task": "classify"}, "only 'a'"),
        ],
    )  # fmt: skip
    def test_in_one_sentence(self, request, base, records, columns, config, message):
        base = build_base(base) if base == "gpt2" else request.getfixturevalue(base)
        with pytest.raises(ConfigError, match=message):
            with_task(rows_from_records(records, **columns), base, TrainConfig(**config))

    @pytest.mark.parametrize(("task", "example"), [("tag", "text_column for the words"), ("embed", "{anchor}")])
    def test_columns_that_are_not_what_a_task_reads_are_refused_with_what_to_give(self, task, example):
        with pytest.raises(DataError, match=f"task '{task}' needs columns that 'text', 'label' are not; .*{example}"):
            rows_from_records(REVIEWS, task=task)

    @pytest.mark.parametrize(
        ("labels", "words", "message"),
        [
            ("01", (), r"labels of records are numbers \('0', '1'\).*0=terrible"),
            (("bad", "good"), ("nice=w15",), "label_words 'nice=w15' names none of the labels 'bad', 'good'"),
            (("bad", "good"), ("good=",), "has no word behind the ="),
        ],
    )
    def test_label_words(self, bert, labels, words, message):
        records = [{"text": f"w{20 + i}", "label": labels[i % 2]} for i in range(6)]
        with pytest.raises(ConfigError, match=message):
            built(bert, records, TrainConfig(label_words=words), **CLOZE)

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([{"tokens": ["w5", "w6"], "tags": ["O"]}], "row 1 of records: column 'tokens' has 2 words .* 1 tags"),
            ([{"tokens": ["w5", 3.5], "tags": ["O", "O"]}], "row 1 of records: column 'tokens' holds no text"),
            ([{"tokens": ["w5"], "tags": [""]}], "has a word without a tag"),
            ([{**QUESTIONS[0], "answers": {"start": 3}}], "column 'answers' has no text, its keys are start"),
            ([{**QUESTIONS[0], "answers": {"text": ["b"], "answer_start": [1, 2]}}], "has 1 answers and 2 starts"),
        ],
    )  # fmt: skip
    def test_broken_rows_are_named(self, bert, records, message):
        with pytest.raises(DataError, match=message):
            built(bert, [*records, {"tokens": ["w15"], "tags": ["X"]} if "tags" in records[0] else QUESTIONS[0]])


class TestExamples:
    """Ids, columns and labels."""

    def test_a_cloze_has_the_mask_for_its_column(self, bert):
        data = built(bert, REVIEWS, TrainConfig(label_words=("good=w15,w16 w17",)), **CLOZE)
        assert tokens(bert, data.examples[1]) == ["[CLS]", "w21", "w31", "w9", "[MASK]", "w8", "[SEP]"]
        assert [(each.columns, each.labels, each.num_before) for each in data.examples[:2]] == [
            ((4,), (0,), 1), ((4,), (1,), 1),
        ]  # fmt: skip
        assert data.form.label_words == (("bad",), ("w15", "w16 w17"))

    @pytest.mark.parametrize(
        ("template", "kept"),
        [
            ("{text} w9 [MASK] w8", ["[CLS]", "w9", "[MASK]", "w8", "[SEP]"]),
            ("[MASK] w9 {text}", ["[CLS]", "[MASK]", "w9", "w20", "[SEP]"]),
        ],
    )
    def test_a_cloze_that_is_cut_keeps_its_mask(self, bert, template, kept):
        data = built(bert, REVIEWS, max_length=5, template=template, completion="{label}")
        assert tokens(bert, data.examples[0]) == kept
        assert data.report.truncated_rows == tuple(range(6))
        (column,) = data.examples[0].columns
        assert data.examples[0].ids[column] == bert.mask_id
        with pytest.raises(LengthError):
            built(bert, REVIEWS, max_length=2, template=template, completion="{label}")

    def test_a_mask_that_a_text_has_is_only_text(self, byte_encoder):
        for text, mask in (("a <mask> film", "[MASK]"), ("a [MASK] film", "<mask>"), ("a film", "[MASK]")):
            records = [{**row, "text": text, "label": row["label"][0]} for row in REVIEWS]
            data = built(byte_encoder, records, template=f"{{text}} is {mask} .", completion="{label}")
            ids = data.examples[0].ids
            assert ids.count(byte_encoder.mask_id) == 1
            whole = byte_encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert whole == f"<s>{text} is<mask> .</s>"  # RoBERTa's mask has the space in front of it

    @pytest.mark.parametrize(
        ("pooling", "placement", "columns"),
        [("cls", "auto", (0,)), ("last", "auto", (3,)), ("mean", "front", (0, 1, 2, 3)), ("peft", "auto", (-1,))],
    )
    def test_a_classified_text_is_pooled_as_asked(self, bert, pooling, placement, columns):
        data = built(bert, REVIEWS, TrainConfig(pooling=pooling, placement=placement))
        first = data.examples[0]
        assert tokens(bert, first) == ["[CLS]", "w20", "w30", "[SEP]"]
        assert (first.columns, first.labels) == (columns, (0,))
        assert first.num_before == (0 if "front" in (placement, data.form.placement) else 1)

    def test_a_causal_base_is_read_at_its_last_token_and_has_nothing_in_front_of_the_prompt(self):
        base = build_base("llama")
        first = built(base, REVIEWS, TrainConfig(task="classify")).examples[0]
        assert (first.ids[: first.num_special], first.columns, first.num_before) == (base.bos_ids, (2,), 0)

    def test_a_long_text_keeps_its_start_and_a_template_its_end(self, bert):
        assert tokens(bert, built(bert, REVIEWS, max_length=3).examples[0]) == ["[CLS]", "w20", "[SEP]"]
        asked = built(bert, REVIEWS, max_length=3, template="{text} w7", completion="{label}")
        assert tokens(bert, asked.examples[0]) == ["[CLS]", "w7", "[SEP]"]

    def test_each_word_with_a_tag_is_read_at_its_first_token(self, byte_encoder):
        records = [{"words": ["Review:", "film", "x"], "tags": [3, 0, -100]}, {"words": "a good", "tags": "0 10"}]
        data = built(byte_encoder, records, TrainConfig(task="tag"), text_column="words", label_column="tags")
        assert data.form.labels == ("0", "3", "10")
        example = data.examples[0]
        assert [byte_encoder.decode(example.ids[column:]).strip().split()[0] for column in example.columns] == [
            "Review:", "film",
        ]  # fmt: skip
        assert [data.form.labels[label] for label in example.labels] == ["3", "0"]
        assert data.report.num_targets == 4

    def test_words_behind_the_limit_have_no_column(self, bert):
        data = built(bert, TAGGED, max_length=3)
        assert [(each.columns, each.labels) for each in data.examples] == [((1,), (1,))] * 4
        assert data.form.labels == ("LOC", "O", "PER")

    def test_an_answer_is_a_first_and_a_last_column_of_the_context(self, bert):
        data = built(bert, QUESTIONS)
        first = data.examples[0]
        assert tokens(bert, first) == ["[CLS]", "w50", "[SEP]", "w20", "w21", "w30", "w22", "[SEP]"]
        assert (first.columns, first.labels) == ((3, 4, 5, 6), (2, 2))
        roberta = build_encoder("roberta")
        assert tokens(roberta, built(roberta, QUESTIONS).examples[0])[:4] == ["<s>", "w50", "</s>", "</s>"]

    def test_an_answer_far_into_a_long_context_is_in_a_window(self, bert):
        context = " ".join(f"w{10 + i}" for i in range(40))
        records = [{"question": "w50", "context": context, "answers": f"w{10 + i} w{11 + i}"} for i in (0, 7, 20, 38)]
        data = built(bert, records, max_length=14)
        for i, example in zip((0, 7, 20, 38), data.examples, strict=True):
            assert len(example.ids) <= 14
            first, last = (example.columns[label] for label in example.labels)
            assert tokens(bert, example)[first : last + 1] == [f"w{10 + i}", f"w{11 + i}"]
        assert data.report.truncated_rows == (0, 1, 2, 3)

    def test_rows_whose_answer_is_not_there_are_skipped_and_named(self, bert):
        more = [
            {"question": "w5", "context": "w6 w7", "answers": {"text": [a], "answer_start": [0]}} for a in ("w9", "")
        ]
        data = built(bert, [*QUESTIONS, *more])
        assert len(data) == 4
        assert "records: skipped, the answer is not in the context: 1 row (row 5)" in data.report.notes
        assert "records: skipped, it has no answer: 1 row (row 6)" in data.report.notes

    def test_a_start_that_is_wrong_is_corrected_to_the_nearest(self, bert):
        record = {"question": "w5", "context": "w6 w7 w6 w8", "answers": {"text": ["w6"], "answer_start": [5]}}
        assert [each.labels for each in built(bert, [record] * 2).examples] == [(2, 2)] * 2

    def test_an_anchor_has_its_other_texts_beside_it(self, bert):
        first = built(bert, PAIRS).examples[0]
        cls, sep = bert.bos_ids, bert.end_ids
        assert first.others == tuple((*cls, *bert.encode(text), *sep) for text in ("w30", "w40"))
        assert (first.columns, first.num_tokens) == ((0, 1, 2), 9)

    def test_the_report_counts_what_the_head_is_to_find(self, bert):
        lines = report_lines(built(bert, REVIEWS, **CLOZE).report)
        assert lines[0] == "records: 6 of 6 rows used, 42 tokens (7 to 7 a row), 6 labels"
        assert lines[-1] == "as the model sees it: [CLS][soft prompt] w20 w30 w9 [MASK] w8 [SEP] -> bad"

    def test_the_hash_covers_all_that_training_sees(self, bert):
        changes = [
            (TAGGED, {"ner_tags": ["PER", "O"]}), (QUESTIONS, {"answers": {"text": ["w22"], "answer_start": [11]}}),
            (PAIRS, {"negative": "w60"}),
        ]  # fmt: skip
        for records, change in changes:
            other = [{**records[0], **change}, *records[1:]]
            assert len({built(bert, each).data_hash for each in (records, other, records)}) == 2


class TestInputs:
    """What is read of a text at inference is what was read of it in training."""

    @pytest.mark.parametrize(
        ("records", "columns", "inputs"),
        [
            (REVIEWS, {}, ["text"]), (REVIEWS, CLOZE, ["text"]), (TAGGED, {}, ["tokens"]), (PAIRS, {}, ["anchor"]),
            (QUESTIONS, {}, ["question", "context"]),
        ],
    )  # fmt: skip
    def test_equals_training(self, bert, records, columns, inputs):
        data = built(bert, records, **columns)
        for record, example in zip(records, data.examples, strict=True):
            (found,) = task_inputs(bert, data.form, {name: record[name] for name in inputs}, max_length=40)
            assert (found.example.ids, found.example.columns) == (example.ids, example.columns)
            assert (found.example.num_before, found.example.labels) == (example.num_before, ())

    def test_a_text_with_spaces_is_words_and_columns_name_them(self, bert):
        form = built(bert, TAGGED).form
        (found,) = task_inputs(bert, form, "w20 w40 w15", max_length=4)
        assert (found.units, found.is_truncated) == ((0, 1), True)

    def test_a_context_is_read_in_windows_that_name_its_characters(self, bert):
        form, context = built(bert, QUESTIONS).form, " ".join(f"w{10 + i}" for i in range(40))
        found = task_inputs(bert, form, {"question": "w5", "context": context}, max_length=14)
        assert {context[first:end] for each in found for first, end in each.spans} == set(context.split())
        assert all(len(each.spans) == len(each.example.columns) for each in found)

    def test_an_input_that_does_not_suit_the_form_is_refused(self, bert):
        form = built(bert, QUESTIONS).form
        with pytest.raises(DataError, match="fields 'question', 'context'"):
            task_inputs(bert, form, "w5", max_length=14)
        with pytest.raises(DataError, match="there is no field 'context'"):
            task_inputs(bert, form, {"question": "w5"}, max_length=14)


class TestFiles:
    """Lists and nested cells from JSON lines, Parquet and CSV, split and read again."""

    @pytest.mark.parametrize("records", [TAGGED * 12, QUESTIONS * 12, PAIRS * 20], ids=["tag", "answer", "embed"])
    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_are_read_alike_and_split(self, tmp_path, bert, records, kind):
        records = [{**row, **_apart(row, i)} for i, row in enumerate(records)]
        path = tmp_path / f"a.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in records))
        else:
            import datasets

            datasets.Dataset.from_list(records).to_parquet(path)
        config = DataConfig(data=str(path), validation="5", test="3")
        split = split_rows(config)
        assert [len(split.train), len(split.validation), len(split.test)] == [len(records) - 8, 5, 3]
        rows = with_task(read_rows(config), bert, TrainConfig())
        same = with_task(rows_from_records(records), bert, TrainConfig())
        assert rows_hash(rows) == rows_hash(same)
        again = split_rows(config, form=with_task(split.train, bert, TrainConfig()).form)
        assert rows_hash(again.test) == rows_hash(split.test)

    def test_a_csv_has_words_and_tags_with_spaces_between(self, tmp_path, bert):
        (tmp_path / "a.csv").write_text("words,tags\nw5 w6,O LOC\nw7,O\n")
        config = DataConfig(data=str(tmp_path / "a.csv"), text_column="words", label_column="tags")
        rows = with_task(read_rows(config, task="tag"), bert, TrainConfig(task="tag"))
        assert [each.labels for each in build_task_examples(bert, rows, max_length=9).examples] == [(1, 0), (1,)]

    def test_tags_of_a_parquet_with_class_names_are_read_by_name(self, tmp_path):
        import datasets

        tags = datasets.Sequence(datasets.ClassLabel(names=["O", "PER"]))
        features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, features=features).to_parquet(path)
        assert read_rows(DataConfig(data=str(path))).records[0]["ner_tags"] == ["PER", "O"]

    def test_every_label_is_left_in_training(self, tmp_path, bert):
        rows = [{"text": f"w{9 + i}", "label": "rare" if i < 2 else ("a", "b")[i % 2]} for i in range(60)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for seed in range(5):
            config = DataConfig(data=str(tmp_path / "a.jsonl"), validation="30")
            split = split_rows(config, seed=seed, task="classify")
            data = build_task_examples(bert, with_task(split.train, bert, TrainConfig()), max_length=9)
            assert {each.labels[0] for each in data.examples} == {0, 1, 2}


def _apart(row, number):
    """A word of its own for each row, so that it may be held out."""
    word = f"x{number}"
    if "tokens" in row:
        return {"tokens": [row["tokens"][0], word]}
    return {"question": word} if "question" in row else {"anchor": word}
