"""Private words that the code and the docs have given up stay out; the field's words stand beside them.

A word counts wherever it is a whole word, or a part of an identifier: `told`, `is_told`, `_told`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Words that are out", maxsplit=1)[1]
OUT = dict(re.findall(r"^\| ([a-z ]+) \| ([^|]+) \|$", TABLE, flags=re.MULTILINE))
del OUT["out"]  # the table's head


def occurrences(word: str, text: str) -> list[str]:
    """The lines of a text that have the word, in prose, in snake_case or in CamelCase."""
    parts = word.split()
    prose = r"[ _]".join(parts)
    camel = "".join(part.capitalize() for part in parts)
    pattern = re.compile(rf"(?<![A-Za-z])(?i:{prose})(?![A-Za-z])|(?<![A-Z]){camel}(?![a-z])")
    if not re.search("[ _]?".join(parts), text, re.IGNORECASE):  # the quick answer for nearly every file
        return []
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


@cache
def texts() -> dict[str, str]:
    """Source and docs by path, without the log and the decisions: these tell history in the words of their day."""
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"]
    files = [*(ROOT / "src").rglob("*.py"), *pages, ROOT / "README.md"]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("word", OUT)
def test_a_word_that_is_out_occurs_nowhere_in_code_and_docs(word):
    found = {path: lines for path, text in texts().items() if (lines := occurrences(word, text))}
    assert not found, f"write {OUT[word]!r} in place of {word!r}: {found}"


@pytest.mark.parametrize(
    "text", ["they obey.", "Obey it", "def _obey(self)", "obey_signal", "class ObeySignal", "is_obey"]
)
def test_a_word_is_found_in_prose_and_in_identifiers(text):
    assert occurrences("obey", text) == [text]


def test_a_word_inside_another_word_is_not_found():
    assert occurrences("hear", "the heart, shear and hearing of rehearsals") == []
