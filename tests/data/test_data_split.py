import pytest

from softprompt.config import DataConfig
from softprompt.data import held_out_record, split_rows
from softprompt.data.rows import render_rows, rows_hash
from softprompt.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(f"row {number}" for number in range(300)))
    return path


def split(path, seed=0, **settings):
    return split_rows(DataConfig(data=str(path), **settings), seed=seed)


def texts(rows):
    return [] if rows is None else [row.text for row in render_rows(rows)]


def test_by_default_the_test_rows_are_the_200_after_the_training_rows(source):
    parts = split(source, rows=50)
    assert parts.train.indices == tuple(range(50))
    assert parts.validation is None
    assert parts.test.indices == tuple(range(50, 250))
    assert split(source, rows=250).test.indices == tuple(range(250, 300))
    assert split(source).test is None


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 50, "validation": "0.2"},
        {"validation": "0.1", "test": "40"},
        {"rows": 100, "validation": "10", "test": "0.1", "shuffle": True},
        {"test": "200", "shuffle": True},
    ],
)
def test_splits_are_disjoint_and_follow_from_the_seed(source, settings):
    parts, again, other = (split(source, seed, **settings) for seed in (0, 0, 1))
    for name in ("train", "validation", "test"):
        assert getattr(parts, name) == getattr(again, name)
    assert parts.train.indices != other.train.indices
    everything = [text for part in (parts.train, parts.validation, parts.test) for text in texts(part)]
    assert len(everything) == len(set(everything))


def test_a_split_is_a_number_or_a_share_of_rows(source):
    parts = split(source, rows=100, validation="0.2", test="30")
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (80, 20, 30)
    assert set(parts.train.indices) | set(parts.validation.indices) == set(range(100))
    parts = split(source, validation="10", test="0.1")
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (260, 10, 30)


def test_a_text_that_training_has_is_not_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\na\nc\n\nd\nb\nc\n")
    assert texts(split(path, rows=2).test) == ["c", "d", "c"]  # nor is an empty row
    for seed in range(8):
        parts = split(path, seed, validation="1")
        assert texts(parts.validation) == ["d"]
    other = tmp_path / "b.txt"
    other.write_text("a\nz\n")
    assert texts(split(path, test=str(other)).test) == ["z"]
    assert texts(split(path, validation=str(other), rows=1).test) == ["b", "c", "d", "b", "c"]


def test_split_files_have_the_form_of_the_training_rows(tmp_path):
    rows = "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(8))
    (tmp_path / "a.csv").write_text(rows)
    (tmp_path / "b.csv").write_text("text,label\nother,a\n")
    parts = split(
        tmp_path / "a.csv", template="{text}:", completion=" {label}", test=str(tmp_path / "b.csv"), validation="2"
    )
    assert parts.train.form.labels == (" a", " b")
    assert parts.test.form == parts.validation.form == parts.train.form
    # The training column was the only one of text; the other file has two, and the same one is read.
    (tmp_path / "c.jsonl").write_text('{"quote": "x", "n": 1}\n')
    (tmp_path / "d.csv").write_text("author,quote\nme,y\n")
    assert texts(split(tmp_path / "c.jsonl", validation=str(tmp_path / "d.csv")).validation) == ["y"]


def test_a_run_records_source_indices_and_hash_of_its_test_rows(source):
    test = split(source, rows=298).test
    assert held_out_record(test) == {"source": str(source), "indices": [298, 299], "hash": rows_hash(test)}
    assert rows_hash(test) != rows_hash(test.select([1, 0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": "0"}, "validation is '0'; it must be a share between 0 and 1, a number of rows"),
        ({"test": "1.5"}, "test is '1.5'; it must be a share between 0 and 1"),
        ({"test": "nan"}, "test is 'nan'; it must be a share between 0 and 1"),
        ({"validation": "300"}, "validation asks for 300 of 300 rows of .*, of which 300 have text of their own"),
        ({"rows": 290, "test": "20"}, "test asks for 20 rows, but behind the 290 training rows of .* there are 10"),
        ({"test": "nowhere.csv"}, "there is no data at 'nowhere.csv'"),
    ],
)
def test_an_impossible_split_is_refused(source, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        split(source, **settings)


def test_a_held_out_file_with_only_training_text_is_refused(source):
    with pytest.raises(DataError, match="the text of every row is in training too"):
        split(source, test=str(source))


class TestValidationByDefault:
    """Where rows can be judged: where they have labels, or a task score chooses the checkpoint."""

    TEMPLATE = {"template": "{text}:", "completion": " {label}"}  # noqa: RUF012  # never changed

    @pytest.fixture
    def labelled(self, tmp_path):
        def write(count, labels="ab"):
            path = tmp_path / f"{count}.csv"
            rows = (f"t{i},{labels[i % len(labels)]}\n" for i in range(count))
            path.write_text("text,label\n" + "".join(rows))
            return path

        return write

    @pytest.mark.parametrize(("count", "kept"), [(40, 20), (64, 20), (200, 20), (300, 30)])
    def test_is_a_tenth_of_labelled_rows_but_at_least_20(self, labelled, count, kept):
        path = labelled(count)
        parts = split(path, **self.TEMPLATE)
        assert (len(parts.train), len(parts.validation)) == (count - kept, kept)
        assert not set(texts_with_prompts(parts.train)) & set(texts_with_prompts(parts.validation))
        assert parts.train.notes[-1] == (
            f"{kept} of {count} rows are kept for validation (labels); --validation none trains on all"
        )
        again = split(path, **self.TEMPLATE, validation=parts.validation_setting)  # what a run records
        assert (again.train.indices, again.validation) == (parts.train.indices, parts.validation)

    def test_is_none_of_fewer_than_40_rows_with_a_note(self, labelled):
        parts = split(labelled(39), **self.TEMPLATE)
        assert (len(parts.train), parts.validation, parts.validation_setting) == (39, None, "none")
        assert parts.train.notes[-1] == ("no rows are kept for validation: 39 are too few; from 40 rows on, 20 are")

    def test_counts_the_rows_that_are_trained_on_and_moves_no_test_row(self, labelled):
        path = labelled(300)
        parts, whole = (split(path, **self.TEMPLATE, rows=60, validation=each) for each in (None, "none"))
        assert (len(parts.train), len(parts.validation)) == (40, 20)
        assert set(parts.train.indices) | set(parts.validation.indices) == set(whole.train.indices)
        assert parts.test == whole.test
        assert whole.validation is None

    def test_of_repeated_texts_is_none_with_a_note(self, tmp_path):
        path = tmp_path / "same.csv"
        path.write_text("text,label\n" + "".join(f"t{i // 2},{'ab'[i // 2 % 2]}\n" for i in range(60)))
        parts = split(path, **self.TEMPLATE)
        assert (len(parts.train), parts.validation) == (60, None)
        assert parts.train.notes[-1] == "no rows are kept for validation: of 60, 0 have text of their own"

    def test_of_plain_text_is_none_unless_a_score_chooses(self, source):
        config = DataConfig(data=str(source))
        parts, scored = (split_rows(config, scored=each) for each in (False, True))
        assert (parts.validation, parts.train.notes) == (None, scored.train.notes[:-1])
        assert len(scored.validation) == 30
        assert "(a task score)" in scored.train.notes[-1]

    @pytest.mark.parametrize("validation", [None, "20"])
    def test_leaves_each_label_a_row_in_training(self, labelled, validation):
        """Of labels with two rows each, some lose both where rows are drawn without looking at labels."""
        letters = "abcdefghijklmnopqrstuvwxyz"[:24]
        for seed in range(5):
            parts = split(labelled(48, letters), seed, **self.TEMPLATE, validation=validation)
            assert {row.text for row in render_rows(parts.train)} == {f" {letter}" for letter in letters}
            assert len(parts.train.form.labels) == 24
            assert len(parts.train) + len(parts.validation) == 48
            assert 10 <= len(parts.validation) <= 20
            if validation is None:
                assert parts.train.notes[-1].startswith(f"{len(parts.validation)} of 48 rows are kept")


def texts_with_prompts(rows):
    return [row.key for row in render_rows(rows)]
