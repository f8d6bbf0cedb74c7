"""Text with `{column}` fields. Data stays data: a field is a column's whole name; nothing is looked up in a value.

`{{` and `}}` are literal braces. There are no attributes, indices, conversions or format specifications: `{a.b}` is
the column called "a.b".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from softprompt.errors import ConfigError, DataError

_PIECES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+")


class Piece(NamedTuple):
    """Literal text, or a field to be filled."""

    text: str  # the text itself, or the column's name
    is_field: bool


@lru_cache(maxsize=64)
def parse_template(template: str) -> tuple[Piece, ...]:
    """The template's pieces in order. Raises ConfigError where a brace stands alone."""
    pieces = []
    for match in _PIECES.finditer(template):
        token, field = match.group(), match.group(1)
        if token in ("{", "}"):
            raise ConfigError(
                f"template {template!r} has a single {token!r} at character {match.start() + 1}; "
                f"write {{column}} for a field and {token * 2!r} for the character itself"
            )
        pieces.append(Piece(field, True) if field is not None else Piece(_literal(token), False))
    return tuple(pieces)


def template_fields(template: str) -> tuple[str, ...]:
    """The columns that a template needs, each once, in order of appearance."""
    return tuple(dict.fromkeys(piece.text for piece in parse_template(template) if piece.is_field))


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """The template with every field replaced by its text.

    Raises ConfigError for a broken template, DataError for a field that is not given.
    """
    require_fields(template, fields)
    return "".join(fields[piece.text] if piece.is_field else piece.text for piece in parse_template(template))


def require_fields(template: str, columns: Iterable[str], where: str = "") -> None:
    """Raises DataError for a field of the template that is no column."""
    names = list(columns)
    for field in template_fields(template):
        if field not in names:
            raise DataError(f"{where}template {template!r} asks for {field!r}; {known_columns(field, names)}")


def known_columns(wanted: str, columns: Iterable[str]) -> str:
    """What there is instead of the wanted column, the nearest name first: the end of an error message."""
    names = list(columns)
    near = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], n=1)
    listed = f"the columns are {', '.join(map(repr, names))}" if names else "there are no columns"
    if not near:
        return listed
    nearest = next(name for name in names if name.lower() == near[0])
    return f"did you mean {nearest!r}? {listed}"


def _literal(token: str) -> str:
    return token[0] if token in ("{{", "}}") else token
