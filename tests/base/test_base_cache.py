"""A cache keeps what was written, loses nothing to another process, and is never a reason to fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.base.cache import cache_folder, read_cached, update_cached

NAME = "known.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_ours_then_xdg_then_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SOFTPROMPT_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("SOFTPROMPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "softprompt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    assert cache_folder() == Path.home() / ".cache" / "softprompt"
    monkeypatch.setenv("SOFTPROMPT_CACHE", "")
    assert cache_folder() is None


def test_what_was_written_is_read_again(folder):
    assert read_cached(NAME) == {}
    assert update_cached(NAME, lambda known: {**known, "one": 1}) == {"one": 1}
    update_cached(NAME, lambda known: {**known, "two": [2]})
    assert read_cached(NAME) == {"one": 1, "two": [2]}
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [NAME]


def test_without_a_folder_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("SOFTPROMPT_CACHE", "")
    monkeypatch.chdir(tmp_path)
    assert update_cached(NAME, lambda known: {"one": 1}) == {"one": 1}
    assert read_cached(NAME) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_broken_file_counts_as_empty_and_is_replaced(folder, content):
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    assert read_cached(NAME) == {}
    update_cached(NAME, lambda known: {**known, "one": 1})
    assert json.loads((folder / NAME).read_text()) == {"one": 1}


def test_a_folder_that_cannot_be_made_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "file" / "cache"))
    assert update_cached(NAME, lambda known: {"one": 1}) == {"one": 1}
    assert read_cached(NAME) == {}


def test_a_change_that_fails_leaves_the_file_and_the_lock_free(folder):
    update_cached(NAME, lambda known: {"one": 1})
    with pytest.raises(ZeroDivisionError):
        update_cached(NAME, lambda known: {"two": 1 // 0})
    assert update_cached(NAME, lambda known: {**known, "two": 2}) == {"one": 1, "two": 2}


WRITER = """
import sys
from softprompt.base.cache import update_cached
for number in range(20):
    update_cached("known.json", lambda known: {**known, f"{sys.argv[1]}{number}": number})
"""


@pytest.mark.medium
def test_processes_that_write_at_once_lose_nothing(folder):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert len(read_cached(NAME)) == 60
