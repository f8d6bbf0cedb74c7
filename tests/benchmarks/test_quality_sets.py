"""The sets of the bench: made alike every time, and no test row's text is a training row's."""

from __future__ import annotations

import importlib
import re
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from softprompt.data import render_rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MATERIAL = Path(__file__).parents[3] / "shared" / "data"
GENERATED = ("tickets", "records", "chats")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality_generated")


@pytest.fixture
def cases(generated: ModuleType) -> ModuleType:
    return importlib.import_module("quality_cases")


def test_generated_rows_follow_from_the_seed_and_fewer_rows_are_the_start_of_more(generated: Any) -> None:
    for name in GENERATED:
        make = getattr(generated, name)
        train, test = make(40, 30)
        assert make(40, 30) == (train, test) and make(15, 30)[0] == train[:15], name
        assert make(40, 30, seed=16)[0] != train, name


def test_no_sentence_frame_and_no_filler_is_in_both_parts(generated: Any) -> None:
    tickets = generated.TRAIN_TICKETS, generated.TEST_TICKETS
    for part in ("openings", "products", "times"):
        assert not set(getattr(tickets[0], part)) & set(getattr(tickets[1], part)), part
    frames = [{frame for group in words.complaints.values() for frame in group} for words in tickets]
    assert not frames[0] & frames[1] and not set(generated.TRAIN_NOTES) & set(generated.TEST_NOTES)
    chats = generated.TRAIN_CHATS, generated.TEST_CHATS
    for part in ("parts", "places", "names"):
        assert not set(getattr(chats[0], part)) & set(getattr(chats[1], part)), part
    sentences = [{text for pair in words.subjects.values() for side in pair for text in side} for words in chats]
    assert not sentences[0] & sentences[1]


def test_a_record_is_what_its_note_says(generated: Any) -> None:
    for row in generated.records(200, 1)[0]:
        when, room = row["record"].split("|")
        found = datetime.fromisoformat(when)
        weekday = re.search(r"\w+day", row["note"])
        assert weekday is None or weekday[0] == f"{found:%A}"
        assert f"{found:%B}" in row["note"] and re.search(rf"oom {room}\b", row["note"])
        clock = re.search(r"\d+:\d\d [ap]m", row["note"])
        assert clock is not None and datetime.strptime(clock[0], "%I:%M %p").time() == found.time()


def test_teams_take_equal_shares(generated: Any) -> None:
    labels = [row["label"] for row in generated.tickets(60, 1)[0]]
    assert {labels.count(team) for team in generated.TEAMS} == {10}


@pytest.mark.parametrize("name", ["topics-200", "records-200", "chat-100", "quotes-200", "roles-50", "sst2-1000"])
def test_no_text_that_is_scored_was_trained_on(cases: Any, name: str) -> None:
    if name.startswith(("quotes", "roles", "sst2")) and not MATERIAL.is_dir():
        pytest.skip("the real sets are not there")
    found = cases.real_set(name, MATERIAL)
    keys = [{row.key for row in render_rows(rows)} for rows in (found.train, found.test)]
    assert len(keys[1]) == len(found.test) == (400 if found.test.form.labels else 100)
    assert not keys[0] & keys[1]
    assert len(found.templates) == (5 if found.train.form.kind == "template" else 0)
    assert all(text.count("{") == 1 for text in found.templates) and found.instruction


def test_an_unknown_set_is_refused_in_a_sentence(cases: Any) -> None:
    for name in ("poems-25", "quotes", "quotes-0", "quotes-x"):
        with pytest.raises(SystemExit, match="is no set; give a kind"):
            cases.real_set(name, MATERIAL)
