"""Records from text files, every value exactly the text in the file, every error with its line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.compute_share import yield_point
from softprompt.errors import DataError

Record = dict[str, Any]  # Any: JSON and Parquet cells are checked when they are asked for

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what Excel's "Unicode text" begins with
_PLAIN_ENDINGS = (".txt", ".text")  # which may well be about web pages
_WEB_PAGE = ("<!doctype html", "<html")  # what is downloaded in a file's place
_MOST_DIGITS = 4_300  # of a whole number that Python reads


class FileRows(NamedTuple):
    """What a file holds, and what the user should know about how it was read."""

    records: list[Record]
    notes: tuple[str, ...] = ()


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice, of which a reader would drop one."""


def read_text(path: Path) -> str:
    """A file's text: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises DataError naming the line of a wrong byte, and for what is no text at all.
    """
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith(_UTF16_MARKS) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')}: byte 0x{raw[error.start]:02x} in line {line:,} "
            f"(byte {error.start:,} of the file); save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line:,} holds a NUL character: it is no text, or not UTF-8; save it so")
    if path.suffix.lower() not in _PLAIN_ENDINGS and text[:200].lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{path} is a web page (HTML), not data; download the file itself")
    return text


def read_lines(path: Path) -> list[Record]:
    """One record {"text": line} per line. Lines end at a newline alone, not at the other marks Unicode has."""
    text = read_text(path).replace("\r\n", "\n")
    return [{"text": line} for line in text.removesuffix("\n").split("\n")] if text else []


def read_json(path: Path) -> list[Record]:
    """Records of a JSON list of objects, or of JSON lines; a string in an object's place is a record {"text": string}.

    Raises DataError naming the line that is no JSON, or no object.
    """
    text = read_text(path)
    items = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    return [_object(path, place, item) for place, item in items]


def load_json(text: str) -> Any:  # Any: whatever JSON holds
    """The value; a whole number of more digits than Python reads is those digits as text.

    Raises json.JSONDecodeError, RepeatedKeyError, or RecursionError where it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, RepeatedKeyError):
        raise
    except ValueError:  # only then, since it takes longer
        return json.loads(text, object_pairs_hook=_without_repeats, parse_int=_whole_number)


def json_problem(error: Exception) -> str:
    """Why `load_json` has failed, for a sentence that says where."""
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg})"
    return str(error) if isinstance(error, RepeatedKeyError) else "is not JSON (nested too deeply)"


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"has the key {twice!r} twice in one object")
    return found


def _whole_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


def _json_list(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        items = load_json(text)
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno:,}" if isinstance(error, json.JSONDecodeError) else ""
        raise _broken_json(path, place, error) from error
    return [(f"item {number:,}", item) for number, item in enumerate(items, start=1)]


def _json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        yield_point()
        try:
            items.append((f"line {number:,}", load_json(line)))
        except (ValueError, RecursionError) as error:
            raise _broken_json(path, f", line {number:,}", error) from error
    return items


def _broken_json(path: Path, place: str, error: Exception) -> DataError:
    what_to_do = "keep one" if isinstance(error, RepeatedKeyError) else "give one object per line, or a list of objects"
    return DataError(f"{path}{place} {json_problem(error)}; {what_to_do}")


def _object(path: Path, place: str, item: Any) -> Record:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise DataError(f"{path}, {place} is a {type(item).__name__}; give objects with named columns")
    return item
