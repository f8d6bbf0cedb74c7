"""One tiny base on disk, three small data sets of its words, and prompts trained on them once."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import succeed
from support.material import QUICK, TEMPLATE, chat, review, save_base, sentence, write_csv, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that; Ctrl-C is tested here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says does not depend on who else computes here."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="session")
def base_folder(place: Path) -> Path:
    return save_base(place / "tiny-llama")


@pytest.fixture(scope="session")
def other_base_folder(place: Path) -> Path:
    """The same shapes, other weights."""
    return save_base(place / "other-llama", seed=1)


@pytest.fixture(scope="session")
def texts(place: Path) -> Path:
    return write_csv(place / "texts.csv", [{"act": str(i), "prompt": sentence(i)} for i in range(40)])


@pytest.fixture(scope="session")
def reviews(place: Path) -> Path:
    return write_jsonl(place / "reviews.jsonl", [review(i) for i in range(40)])


@pytest.fixture(scope="session")
def chats(place: Path) -> Path:
    return write_jsonl(place / "chats.jsonl", [chat(i) for i in range(20)])


@pytest.fixture(scope="session")
def library(place: Path, base_folder: Path, texts: Path, reviews: Path) -> Path:
    """`coach` on plain text, `critic` on labelled reviews; read only."""
    train = ("train", "--base", base_folder, *QUICK, "--rows", 24)
    succeed(*train, "--data", texts, "--text-column", "prompt", "--out", place / "library" / "coach")
    succeed(*train, "--data", reviews, *TEMPLATE, "--out", place / "library" / "critic")
    return place / "library"


@pytest.fixture(scope="session")
def prompts(library: Path, place: Path, base_folder: Path, chats: Path) -> Path:
    """`coach` on plain text, `critic` on a template with labels, `helper` on chats, `pairs` on two fields."""
    train = ("train", "--base", base_folder, *QUICK)
    two = [{"a": f"w{i}", "b": f"w{i + 3}", "label": f"w{50 + i}"} for i in range(24)]
    pairs = write_jsonl(place / "pairs.jsonl", two)
    succeed(*train, "--data", chats, "--out", place / "inputs" / "helper")
    flags = ("--template", "{a} w5 {b}", "--completion", " {label}")
    succeed(*train, "--data", pairs, *flags, "--out", place / "inputs" / "pairs")
    for name in ("coach", "critic"):
        shutil.copytree(library / name, place / "inputs" / name)
    return place / "inputs"


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """A place for --out that must not be there when the test ends, nor anything beside it."""
    yield tmp_path / "out" / "run"
    assert not (tmp_path / "out").exists(), "something half-written was left"
