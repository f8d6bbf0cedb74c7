"""A set of prompts that vote: a folder with `prompt_set.json`, which names adapter folders below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.errors import AdapterError
from softprompt.prompt import SoftPrompt
from softprompt.storage.adapter import load_prompt
from softprompt.storage.atomic import write_file
from softprompt.storage.files import MAX_TEXT_BYTES, dump_object, parse_object, read_file

if TYPE_CHECKING:
    from softprompt.base import Base

SET_NAME = "prompt_set.json"
_MARK, _VERSION = "softprompt_set", 1
_MAX_MEMBERS = 1_000


def save_set(folder: Path, members: Sequence[str]) -> None:
    """Make `folder` a set of the adapter folders `members`, given relative to it.

    Raises: StorageError.
    """
    write_file(folder / SET_NAME, dump_object({_MARK: _VERSION, "members": list(members)}))


def is_set(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder says that it is a set."""
    return (Path(folder) / SET_NAME).is_file()


def load_set(folder: str | os.PathLike[str], base: Base | None = None, *, force: bool = False) -> dict[str, SoftPrompt]:
    """The members by name, each loaded as `load_prompt` does.

    Raises: AdapterError for a folder that is no set or names what is not below it; WrongBaseError.
    """
    place = Path(folder)
    data = read_file(place, SET_NAME, MAX_TEXT_BYTES)
    known = {} if data is None else parse_object(data, str(place / SET_NAME))
    members = known.get("members")
    if known.get(_MARK) != _VERSION or not isinstance(members, list) or not 0 < len(members) <= _MAX_MEMBERS:
        raise AdapterError(f"{place} is no set of prompts of this release: it has no {SET_NAME} with members")
    return {str(member): load_prompt(_member(place, member), base, force=force) for member in members}


def _member(place: Path, name: object) -> Path:
    path = place / str(name)
    if not isinstance(name, str) or not path.resolve().is_relative_to(place.resolve()):
        raise AdapterError(f"{place / SET_NAME} names {name!r}, which is not below it; a set's prompts lie inside it")
    return path
