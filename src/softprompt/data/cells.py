"""The cells of a row: text, whole numbers, lists of words and of tags, and the answers of a question.

A cell is checked when it is asked for. Text formats have no lists: words and tags are then separated by spaces.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from softprompt.errors import DataError, shortened

NO_TAG = -100  # of a word whose tag does not count, as in token classification sets


def is_missing(cell: object) -> bool:
    """True for None and NaN, which readers make of an empty cell."""
    return cell is None or (isinstance(cell, float) and cell != cell)


def is_whole_number(cell: object) -> bool:
    """True for Python's and numpy's integers, but not for booleans."""
    return isinstance(cell, Integral) and not isinstance(cell, bool)


def field_cell(cell: object, where: str, name: str) -> str:
    """A template's field: text, or a whole number (labels often are) as its digits. Raises DataError."""
    return digits(cell, where, name) if is_whole_number(cell) else text_cell(cell, where, name)


def text_cell(cell: object, where: str, name: str) -> str:
    """Text, empty for a missing cell. Raises DataError, naming row and column, for anything else."""
    if isinstance(cell, str):
        return cell
    if is_missing(cell):
        return ""
    raise DataError(
        f"{where}: column {name!r} holds no text but a {type(cell).__name__}, {shortened(cell)}; "
        "choose another column or write it as text"
    )


def digits(cell: Any, where: str, name: str) -> str:  # Any: a whole number, Python's or numpy's
    """A whole number as text. Raises DataError for one that Python does not write."""
    try:
        return str(operator.index(cell))
    except ValueError:
        raise DataError(f"{where}: column {name!r} holds a number of very many digits; write it as text") from None


def word_cell(cell: object, where: str, name: str) -> tuple[str, ...]:
    """The words of a text: a list of strings, or a string with spaces between them. Raises DataError."""
    return tuple(text_cell(item, where, name) for item in _items(cell, where, name, "words"))


def tag_cell(cell: object, where: str, name: str) -> tuple[str | None, ...]:
    """The words' tags: a list of strings or whole numbers, or a string with spaces; None for one that does not count.

    Raises DataError.
    """
    return tuple(_tag(item, where, name) for item in _items(cell, where, name, "tags"))


def _tag(item: object, where: str, name: str) -> str | None:
    text = field_cell(item, where, name).strip()
    if not text:
        raise DataError(f"{where}: column {name!r} has a word without a tag; write O, or {NO_TAG} where none counts")
    return None if text == str(NO_TAG) else text


def _items(cell: Any, where: str, name: str, what: str) -> Sequence[Any]:  # Any: checked here
    if is_missing(cell):
        return ()
    if isinstance(cell, str):
        return cell.split()
    if hasattr(cell, "tolist"):  # numpy
        cell = cell.tolist()
    if isinstance(cell, (list, tuple)):
        return cell
    raise DataError(f"{where}: column {name!r} holds a {type(cell).__name__}, {shortened(cell)}; give a list of {what}")


def answer_cell(
    cell: Any, starts: Any, where: str, name: str
) -> tuple[tuple[str, int | None], ...]:  # Any: checked here
    """The answers of a question, each with where it begins in the context, in characters, or None.

    SQuAD's {"text": [...], "answer_start": [...]}, a list of texts, or one text; `starts` is a cell of a column beside
    it. Raises DataError.
    """
    if isinstance(cell, Mapping):
        if "text" not in cell:
            raise DataError(f"{where}: column {name!r} has no text, its keys are {', '.join(map(str, cell)) or 'none'}")
        cell, starts = cell["text"], cell.get("answer_start", starts)
    texts = [text_cell(item, where, name) for item in _listed(cell)]
    found = [_start(item, where, name) for item in _listed(starts)] or [None] * len(texts)
    if len(found) != len(texts):
        raise DataError(
            f"{where}: column {name!r} has {len(texts)} answers and {len(found)} starts; give each one start"
        )
    return tuple((text, start) for text, start in zip(texts, found, strict=True) if text.strip())


def _listed(cell: Any) -> Sequence[Any]:  # Any: a cell, and what it holds
    if is_missing(cell):
        return ()
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    return cell if isinstance(cell, (list, tuple)) else (cell,)


def _start(item: Any, where: str, name: str) -> int | None:  # Any: checked here
    if is_missing(item) or item == "":
        return None
    if isinstance(item, str) and item.strip().isdecimal():
        return int(item)
    if not is_whole_number(item):
        raise DataError(
            f"{where}: column {name!r} has the start {shortened(item)}; give the number of its first character"
        )
    return operator.index(item)
