"""Settings from a TOML file: every key known, every value of its type, complaints with their place. No torch here."""

from __future__ import annotations

import sys
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError, shortened
from softprompt.settings import check_settings, checked_value, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]  # Any: whatever TOML holds


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
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near is not None else f"known are {', '.join(known)}"
            raise ConfigError(f"{path} has no key {shortened(name)}; {hint}")
    return found


def settings(kind: type[Any], table: object, where: str) -> Table:
    """A section's settings, each of them known and of its type."""
    found = require_table(table, where)
    check_names(kind, found, where)
    hints = typing.get_type_hints(kind)
    return {name: checked_value(hints[name], value, f"{where}: {name}") for name, value in found.items()}


def check_names(kind: type[Any], table: Table, where: str) -> None:
    """Raises ConfigError, with the nearest valid name, for a key that is no setting of `kind`."""
    try:
        check_settings(kind, table)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def require_table(value: object, where: str) -> Table:
    """A section. Raises ConfigError for anything else."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {shortened(value)}; it must be a section of settings")
    return value
