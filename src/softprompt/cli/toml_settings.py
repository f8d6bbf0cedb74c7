"""Settings from a TOML file: every key known, every value of its type, complaints with their place. No torch here."""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Union

from softprompt.config import check_settings
from softprompt.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]  # Any: whatever TOML holds

_TYPE_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def read_toml(path: Path, known: Collection[str], what: str) -> Table:
    """The file's top level. `what` the file is stands in complaints.

    Raises: ConfigError where it cannot be read, is no TOML, or has a key that is not known.
    """
    try:
        found: Table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {' '.join(str(error).split())}") from error
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{path} has no key {name!r}; {hint}")
    return found


def settings(kind: type[Any], table: object, where: str) -> Table:
    """A section's settings, each of them known and of its type."""
    found = require_table(table, where)
    check_names(kind, found, where)
    hints = typing.get_type_hints(kind)
    return {name: typed(hints[name], value, f"{where}: {name}") for name, value in found.items()}


def check_names(kind: type[Any], table: Table, where: str) -> None:
    """Raises ConfigError, with the nearest valid name, for a key that is no setting of `kind`."""
    try:
        check_settings(kind, table)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def require_table(value: object, where: str) -> Table:
    """A section. Raises ConfigError for anything else."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; it must be a section of settings")
    return value


def typed(hint: Any, value: object, where: str) -> Any:  # Any: a type hint in, a value of that type out
    """The value, a whole number as a float where that is wanted. Raises ConfigError for another type."""
    kinds = _alternatives(hint)
    if type(value) in kinds or value in _choices(hint):
        return value
    if type(value) is int and float in kinds:
        return float(value)
    wanted = [_TYPE_NAMES[kind] for kind in kinds] or [f"one of {', '.join(map(repr, _choices(hint)))}"]
    raise ConfigError(f"{where} is {value!r}; it must be {' or '.join(wanted)}")


def _alternatives(hint: Any) -> list[type]:
    """The plain types that a hint allows."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _alternatives(part)]
    return [hint] if hint in _TYPE_NAMES else []


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
