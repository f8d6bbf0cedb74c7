"""What comes from outside: foreign errors become one sentence that a user can act on, the nesting of foreign JSON is
bounded, and the pointers that a clone without git-lfs leaves instead of large files are recognised.

Knows no torch and none of the libraries that raise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softprompt.errors import BaseModelError, SoftpromptError

_LONGEST_CAUSE = 400  # characters of a foreign message that are passed on
_POINTER_LINE = b"version https://git-lfs.github.com/spec/v1"
_MAX_POINTER_BYTES = 1024  # the specification's bound; a larger file is no pointer
_PASSING = (SoftpromptError, KeyboardInterrupt, SystemExit, GeneratorExit)
_SELF_EXPLAINING = (OSError, ValueError, RuntimeError, ImportError)  # messages of other types need the type before them


@contextmanager
def one_sentence(subject: str) -> Iterator[None]:
    """Turns anything that is raised inside into a BaseModelError that begins with `subject`; Ctrl-C and exits pass.

    A panic in a Rust library is a BaseException and no Exception, so all BaseExceptions are caught.
    """
    try:
        yield
    except _PASSING:
        raise
    except BaseException as error:
        if type(error).__name__ == "CancelledError":  # asyncio's, where a server loads a base in a task
            raise
        raise BaseModelError(f"{subject}: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """A foreign error in one line: its message, with its type where the message alone is unclear."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({message[:_LONGEST_CAUSE] or kind})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, EOFError) and not message:
        message = "a file ends before its data does"
    if (isinstance(error, _SELF_EXPLAINING) or type(error) is Exception) and message:
        return message[:_LONGEST_CAUSE]
    return f"{kind}: {message}"[:_LONGEST_CAUSE] if message else kind


def is_nested_deeper(value: Any, limit: int) -> bool:
    """Whether a value from JSON has more levels of lists and objects than `limit`; computed without recursion."""
    level = [value]
    for _ in range(limit):
        level = [item for each in level for item in _items(each)]
    return bool(level)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(value.values())
    return iter(value) if isinstance(value, list) else iter(())


def is_lfs_pointer(data: bytes) -> bool:
    """Whether these bytes, a whole file or more than its first kilobyte, are a Git LFS pointer."""
    return len(data) <= _MAX_POINTER_BYTES and data.removeprefix(b"\xef\xbb\xbf").startswith(_POINTER_LINE)


def lfs_pointer_problem(path: str | os.PathLike[str]) -> str | None:
    """The message that refuses a Git LFS pointer; None for any other file and for a missing one."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > _MAX_POINTER_BYTES:
            return None
        with open(path, "rb") as file:
            is_pointer = is_lfs_pointer(file.read(_MAX_POINTER_BYTES))
    except (OSError, ValueError):  # the caller's own read reports why it fails
        return None
    return lfs_pointer_sentence(path) if is_pointer else None


def lfs_pointer_sentence(where: str | os.PathLike[str]) -> str:
    """The message about a file `where` that is a pointer."""
    return f"{os.fspath(where)} is a Git LFS pointer, not the file itself; fetch the file with git lfs pull"
