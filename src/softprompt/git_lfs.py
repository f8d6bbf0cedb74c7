"""Git LFS pointers: the few lines that a clone without git-lfs leaves instead of a large file."""

from __future__ import annotations

import os

_FIRST_LINE = b"version https://git-lfs.github.com/spec/v1"
_MAX_POINTER_BYTES = 1024  # the specification's bound; a file that is larger is no pointer


def is_lfs_pointer(data: bytes) -> bool:
    """Whether these bytes, a whole file's or more than its first kilobyte, are a Git LFS pointer."""
    return len(data) <= _MAX_POINTER_BYTES and data.removeprefix(b"\xef\xbb\xbf").startswith(_FIRST_LINE)


def lfs_pointer_problem(path: str | os.PathLike[str]) -> str | None:
    """The sentence that refuses a file which is a Git LFS pointer; None for any other file, or for none."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > _MAX_POINTER_BYTES:
            return None
        with open(path, "rb") as file:
            is_pointer = is_lfs_pointer(file.read(_MAX_POINTER_BYTES))
    except (OSError, ValueError):  # whoever reads the file says why it cannot be read
        return None
    return lfs_pointer_sentence(path) if is_pointer else None


def lfs_pointer_sentence(where: str | os.PathLike[str]) -> str:
    """What to tell a user whose file `where` is a pointer."""
    return f"{os.fspath(where)} is a Git LFS pointer, not the file itself; fetch the file with git lfs pull"
