"""Sequences of eight words: what must not be shared between held-out rows and anything that was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

WINDOW = 8
_WORD = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*")


def words(text: str) -> list[str]:
    """The case-folded words of a text, without punctuation."""
    return _WORD.findall(text.casefold())


def windows(text: str) -> Iterator[str]:
    """Every run of eight words, joined by a space."""
    found = words(text)
    for start in range(len(found) - WINDOW + 1):
        yield " ".join(found[start : start + WINDOW])


def window_set(texts: Iterable[str]) -> frozenset[str]:
    """All eight-word sequences of some texts."""
    return frozenset(window for text in texts for window in windows(text))


def shares_window(text: str, taken: frozenset[str]) -> bool:
    """Whether a text holds one of the sequences."""
    return any(window in taken for window in windows(text))
