"""A library: a folder of adapters by name; and a set of prompts that vote: a folder with `prompt_set.json`, which names
adapter folders below it. No name leads out of its folder."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from softprompt.base import Base
from softprompt.errors import AdapterError, SoftpromptError, StorageError
from softprompt.guard import cause_of
from softprompt.prompt import SoftPrompt
from softprompt.storage.adapter import (
    AdapterFiles,
    UnknownBaseWarning,
    load_prompt,
)
from softprompt.storage.atomic import remove_folder, write_file
from softprompt.storage.files import (
    CONFIG_NAME,
    MAX_TEXT_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    SAFETENSORS_NAME,
    dump_object,
    parse_object,
    read_file,
)
from softprompt.storage.save import save_prompt
from softprompt.types import Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MARKS = (CONFIG_NAME, RECORD_NAME, SAFETENSORS_NAME, PICKLE_NAME, "run.json")  # one of them makes a folder ours
SET_NAME = "prompt_set.json"
_SET_MARK, _SET_VERSION = "softprompt_set", 1
_MAX_MEMBERS = 1_000


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """One line of a library's list. An entry that cannot be loaded has a problem, its size and nothing else."""

    name: str
    problem: str | None = None
    num_virtual_tokens: int | None = None
    hidden_size: int | None = None
    base_name: str | None = None
    task: Task | None = None
    content_hash: str | None = None
    created: str | None = None  # when the folder was written, ISO 8601 in UTC; None for PEFT's own folders
    num_bytes: int = 0  # of its files on disk, a run's checkpoints included


class Check(NamedTuple):
    """The verdict on one entry."""

    name: str
    problem: str | None  # None: loads, and fits the base if one was given


class Library:
    """Adapters by name in one folder. Making the object touches nothing; the first `add` makes the folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def place(self, name: str) -> Path:
        """The path of `name`, whether it exists or not.

        Raises: StorageError for a name that is not allowed, or a link that leaves the library.
        """
        check_name(name)
        path = self.folder / name
        if path.is_symlink():
            try:
                meant = path.resolve()
            except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
                raise StorageError(f"{path} is a link that leads nowhere: {error}; remove it") from error
            if not meant.is_relative_to(self.folder.resolve()):
                raise StorageError(f"{path} is a link to {meant}, outside of the library; import that folder")
        return path

    def path(self, name: str) -> Path:
        """The folder of an existing entry.

        Raises: StorageError with the nearest names.
        """
        path = self.place(name)
        if not path.is_dir():
            raise StorageError(f"no prompt {name!r} in the library {self.folder}{self._hint(name)}")
        return path

    def load(self, name: str, base: Base | None = None, *, force: bool = False) -> SoftPrompt:
        """See `load_prompt`."""
        return load_prompt(self.path(name), base, force=force)

    def names(self) -> tuple[str, ...]:
        """Every sub-folder, sorted, hidden ones left out.

        Raises: StorageError where the library is not there.
        """
        if not self.folder.is_dir():
            raise StorageError(f"no library at {self.folder}; give an existing folder, or import a prompt to make it")
        found = (item.name for item in self.folder.iterdir() if item.is_dir() or item.is_symlink())
        return tuple(sorted(name for name in found if not name.startswith(".")))

    def list(self) -> tuple[LibraryEntry, ...]:
        """Every entry with its description, or with its problem.

        Raises: StorageError where the library is not there.
        """
        return tuple(self._describe(name) for name in self.names())

    def check(self, base: Base | None = None) -> tuple[Check, ...]:
        """Load every entry, against `base` if given, and report the problem of each that fails.

        Raises: StorageError where the library is not there.
        """
        return tuple(Check(name, self._problem(name, base)) for name in self.names())

    def add(self, name: str, prompt: SoftPrompt, *, overwrite: bool = False, base: Base | None = None) -> Path:
        """Keep a prompt under `name`.

        Raises: ExistsError, StorageError, WrongBaseError; see `save_prompt`.
        """
        return save_prompt(prompt, self.place(name), overwrite=overwrite, base=base)

    def import_folder(
        self,
        folder: str | os.PathLike[str],
        name: str,
        *,
        overwrite: bool = False,
        base: Base | None = None,
        force: bool = False,
        task_type: str | None = None,
        base_name: str | None = None,
    ) -> Path:
        """Keep a copy of an adapter from elsewhere, PEFT's and `.bin` ones included, rewritten in our form.

        `base` is only checked against; an adapter that names no fingerprint is not given one.

        Raises: AdapterError, WrongBaseError, ExistsError, StorageError; see `load_prompt` for the parameters.
        """
        self.place(name)
        prompt = load_prompt(folder, base, force=force, task_type=task_type, base_name=base_name)
        return self.add(name, prompt, overwrite=overwrite)

    def export(self, name: str, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write an entry to a folder of its own that PEFT loads without asking for a tokenizer.

        Raises: AdapterError, ExistsError, StorageError.
        """
        return save_prompt(self.load(name), folder, overwrite=overwrite)

    def remove(self, name: str) -> None:
        """Delete an entry, a run's checkpoints included; a link is only unlinked.

        Raises: StorageError for a folder that is neither an adapter nor a run.
        """
        path = self.folder / check_name(name)
        if path.is_symlink():
            path.unlink()
            return
        path = self.path(name)
        if not any(os.path.lexists(path / mark) for mark in _MARKS):
            raise StorageError(f"{path} is neither an adapter nor a run and is not deleted; remove it by hand")
        remove_folder(path)

    def _describe(self, name: str) -> LibraryEntry:
        num_bytes = 0
        try:
            path = self.path(name)
            num_bytes = _num_bytes(path)
            files = AdapterFiles.read(path)
            prompt, stored = files.parse(), files.stored
        except Exception as error:  # one bad entry must not hide the others
            return LibraryEntry(name=name, problem=_problem_of(error), num_bytes=num_bytes)
        return LibraryEntry(
            name=name,
            num_virtual_tokens=prompt.num_virtual_tokens,
            hidden_size=prompt.hidden_size,
            base_name=prompt.record.base_name,
            task=prompt.record.form.task,
            content_hash=prompt.content_hash,
            created=None if stored is None else stored.created,
            num_bytes=num_bytes,
        )

    def _problem(self, name: str, base: Base | None) -> str | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnknownBaseWarning)
                self.load(name, base)
        except Exception as error:  # one bad entry must not hide the others
            return _problem_of(error)
        return None

    def _hint(self, name: str) -> str:
        names = self.names() if self.folder.is_dir() else ()
        close = difflib.get_close_matches(name, names, n=3)
        if close:
            return f"; did you mean {' or '.join(map(repr, close))}?"
        return f"; it has {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "; it is empty"


def _problem_of(error: Exception) -> str:
    return str(error) if isinstance(error, SoftpromptError) else f"it cannot be read ({cause_of(error)})"


def check_name(name: str) -> str:
    """The name itself, if a library allows it.

    Raises: StorageError.
    """
    if not NAME.fullmatch(name):
        raise StorageError(
            f"{name!r} is not a prompt's name; a name is 1 to 64 letters, digits, '.', '_' or '-', "
            "the first one a letter or digit"
        )
    return name


def resolve_prompt(text: str, library: Library | str | os.PathLike[str] | None = None) -> Path:
    """The folder that `--prompt text` means: a path if it has a separator, else a name in the library.

    Raises: StorageError where there is no such folder or name.
    """
    if any(separator in text for separator in (os.sep, os.altsep, "/") if separator):
        if not Path(text).is_dir():
            raise StorageError(f"no folder {text}; check the path, or give a name and a library")
        return Path(text)
    check_name(text)
    here = f"; if you mean the folder here, write ./{text}" if Path(text).is_dir() else ""
    if library is None:
        raise StorageError(f"{text!r} is a name, and no library is given; give --library or a path{here}")
    named = library if isinstance(library, Library) else Library(library)
    try:
        return named.path(text)
    except StorageError as error:
        raise StorageError(f"{error}{here}") from None


def _num_bytes(folder: Path) -> int:
    files = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)


def save_set(folder: Path, members: Sequence[str]) -> None:
    """Make `folder` a set of the adapter folders `members`, given relative to it.

    Raises: StorageError.
    """
    write_file(folder / SET_NAME, dump_object({_SET_MARK: _SET_VERSION, "members": list(members)}))


def is_set(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is marked as a set."""
    return (Path(folder) / SET_NAME).is_file()


def load_set(folder: str | os.PathLike[str], base: Base | None = None, *, force: bool = False) -> dict[str, SoftPrompt]:
    """The members by name, each loaded as `load_prompt` does.

    Raises: AdapterError for a folder that is no set or names what is not below it; WrongBaseError.
    """
    root = Path(folder)
    data = read_file(root, SET_NAME, MAX_TEXT_BYTES)
    value = {} if data is None else parse_object(data, str(root / SET_NAME))
    members = value.get("members")
    if value.get(_SET_MARK) != _SET_VERSION or not isinstance(members, list) or not 0 < len(members) <= _MAX_MEMBERS:
        raise AdapterError(f"{root} is no set of prompts of this release: it has no {SET_NAME} with members")
    return {str(member): load_prompt(_member(root, member), base, force=force) for member in members}


def _member(root: Path, name: object) -> Path:
    path = root / str(name)
    if not isinstance(name, str) or not path.resolve().is_relative_to(root.resolve()):
        raise AdapterError(f"{root / SET_NAME} names {name!r}, which is not below it; a set's prompts lie inside it")
    return path
