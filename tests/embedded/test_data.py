"""The shipped data sets: their shapes, that they are what the writer writes, and that held-out rows stand apart."""

from __future__ import annotations

import csv
import json
import re
from itertools import islice
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from writer.corpus import SEED, corpus, shard
from writer.feelings import BOTH_HANDS, LOOSE_TALK, Hand
from writer.overlap import WINDOW, shares_window, window_set, windows, words
from writer.shapes import RULES, Bank, bank_of, template
from writer.shipped import DEMO_INPUTS, shipped_sets

from softprompt.embedded import base_folder, data_file, data_names

TEXT_COLUMNS = {"coach-prompts": "prompt", "quotes": "quote", "reviews": "text"}
COLUMNS = {"coach-prompts": ["act", "prompt"], "quotes": ["quote", "author", "tags"], "reviews": ["text", "label"]}
SUFFIXES = {"coach-prompts": "csv", "quotes": "jsonl", "reviews": "csv"}
BANKS: tuple[Bank, ...] = get_args(Bank)
MAX_BASE_BYTES = 12_000_000


def rows(stem: str, heldout: bool) -> list[dict[str, object]]:
    path = data_file(f"{stem}{'-heldout' if heldout else ''}.{SUFFIXES[stem]}")
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return [dict(row) for row in csv.DictReader(file)]


def texts(stem: str, heldout: bool) -> list[str]:
    return [str(row[TEXT_COLUMNS[stem]]) for row in rows(stem, heldout)]


def plain(template_text: str) -> str:
    return " ".join(words(template_text))


def heldout_texts() -> list[str]:
    return [text for stem in TEXT_COLUMNS for text in texts(stem, True)]


@pytest.mark.parametrize("stem", TEXT_COLUMNS)
@pytest.mark.parametrize("heldout", [False, True])
def test_files_have_their_columns_and_enough_distinct_rows(stem: str, heldout: bool) -> None:
    found = rows(stem, heldout)
    assert all(list(row) == COLUMNS[stem] for row in found)
    assert len(set(texts(stem, heldout))) == len(found) == (200 if stem == "reviews" else 100)


@pytest.mark.parametrize("heldout", [False, True])
def test_review_labels_are_balanced(heldout: bool) -> None:
    labels = [row["label"] for row in rows("reviews", heldout)]
    assert labels.count("positive") == labels.count("negative") == 100


def test_authors_are_descriptions_and_tags_are_lists() -> None:
    for row in rows("quotes", False) + rows("quotes", True):
        assert re.fullmatch("an? [a-z -]+", str(row["author"]))
        assert isinstance(row["tags"], list)
        assert len(row["tags"]) == 2


def test_the_files_are_what_the_writer_writes() -> None:
    written = shipped_sets(SEED)
    assert sorted(written) == list(data_names())
    for stem in TEXT_COLUMNS:
        assert rows(stem, False) == written[f"{stem}.{SUFFIXES[stem]}"]
        assert rows(stem, True) == written[f"{stem}-heldout.{SUFFIXES[stem]}"]


def test_the_writer_is_deterministic_and_its_shards_differ() -> None:
    first, again, other, reseeded = (
        list(islice(documents, 100)) for documents in (shard(3), shard(3), shard(4), shard(3, seed=SEED + 1))
    )
    assert first == again
    assert first != other
    assert first != reseeded


@pytest.mark.parametrize("rule", ["opening", "body", "request", "quote", "review", "neutral"])
def test_no_template_is_in_two_banks(rule: str) -> None:
    rng = Random(1)
    drawn = [{plain(template(rule, bank, rng)) for _ in range(800)} for bank in BANKS]
    pretraining, training, heldout = drawn
    assert not heldout & (pretraining | training)
    assert not training & pretraining
    assert min(map(len, drawn)) > 25


def test_every_template_belongs_to_the_bank_that_drew_it() -> None:
    rng = Random(2)
    assert all(
        bank_of(template(rule, bank, rng)) == bank for rule in ("role", "story") for bank in BANKS for _ in range(99)
    )


def test_rules_name_only_rules() -> None:
    named = {name for options in RULES.values() for option in options for name in re.findall(r"<(\w+)>", option)}
    assert named <= set(RULES)


def test_heldout_rows_share_no_eight_words_with_training_rows() -> None:
    taken = window_set([text for stem in TEXT_COLUMNS for text in texts(stem, False)])
    assert not [text for text in heldout_texts() if shares_window(text, taken)]
    assert shares_window(texts("coach-prompts", False)[0], taken)  # the check can fail


def test_heldout_rows_share_no_eight_words_with_a_sample_of_pretraining() -> None:
    apart = window_set(heldout_texts() + list(DEMO_INPUTS))
    assert not [text for index in (0, 17, 55) for text in islice(shard(index), 400) if shares_window(text, apart)]


def test_without_the_writers_check_some_documents_would_share_eight_words() -> None:
    apart = window_set(heldout_texts() + [text for stem in TEXT_COLUMNS for text in texts(stem, False)])
    assert any(shares_window(text, apart) for index in range(8) for text in shard(index, taken=frozenset()))


@pytest.mark.slow
@pytest.mark.parametrize("hand", [LOOSE_TALK, BOTH_HANDS])  # the last stage's text, and that of the stages before
def test_heldout_rows_share_no_eight_words_with_all_of_pretraining(hand: Hand) -> None:
    apart = window_set(heldout_texts() + list(DEMO_INPUTS))
    assert not [text for text in corpus(hand=hand) if shares_window(text, apart)]


def test_windows_are_runs_of_eight_folded_words() -> None:
    assert list(windows("One two, THREE four-five six: seven eight nine ten.")) == [
        "one two three four-five six seven eight nine",
        "two three four-five six seven eight nine ten",
    ]
    assert WINDOW == 8


def test_the_demo_inputs_are_not_in_the_training_rows() -> None:
    taken = window_set(DEMO_INPUTS)
    assert not [text for stem in TEXT_COLUMNS for text in texts(stem, False) if shares_window(text, taken)]


def test_a_bag_of_words_does_not_solve_the_reviews() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    counter = text.CountVectorizer()
    seen = counter.fit_transform(texts("reviews", False))
    model = linear.LogisticRegression(max_iter=1000).fit(seen, [row["label"] for row in rows("reviews", False)])
    accuracy = model.score(counter.transform(texts("reviews", True)), [row["label"] for row in rows("reviews", True)])
    assert 0.5 < accuracy < 0.85


def test_an_unknown_data_set_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"coach-prompts\.csv"):
        data_file("../__init__.py")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_base_is_small() -> None:
    assert folder_bytes(base_folder()) <= MAX_BASE_BYTES
