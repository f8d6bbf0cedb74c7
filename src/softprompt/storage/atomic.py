"""Files and folders that are there whole or not at all.

Everything is written and synced under a hidden temporary name beside its target and then renamed. Any error, an
interrupt included, removes the temporary and leaves what was there before.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from softprompt.errors import ExistsError, StorageError

PARTIAL_SUFFIX = ".partial"  # a killed process may leave `.NAME.<hex>.partial`; it is never read and may be deleted
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` (bytes) at `path`, replacing a file that is there.

    Raises: StorageError.
    """
    write_files(path.parent, {path.name: data})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put several files into an existing folder: all are on the disk before the first is renamed, in order.

    Raises: StorageError.
    """
    staged = {folder / name: _hidden_sibling(folder / name, PARTIAL_SUFFIX) for name in files}
    with disk_errors(folder):
        try:
            for (target, temporary), data in zip(staged.items(), files.values(), strict=True):
                _write_durably(temporary, data, target)
            for target, temporary in staged.items():
                os.replace(temporary, target)
            sync_folder(folder)
        finally:
            for temporary in staged.values():
                temporary.unlink(missing_ok=True)


def write_folder(folder: Path, files: Mapping[str, bytes], *, replace: bool = False) -> None:
    """Make `folder` with exactly these files (`a/b` is a file in a sub-folder); its parents are made too.

    With `replace`, an existing folder is moved aside first and deleted last: a process killed between the two
    renames leaves the old one whole as `.NAME.<hex>.old`.

    Raises: ExistsError where the folder has content and `replace` is not set; StorageError.
    """
    target = folder.resolve()
    staging = _hidden_sibling(target, PARTIAL_SUFFIX)
    with disk_errors(folder):
        try:
            staging.mkdir(parents=True)
            for name, data in files.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                _write_durably(staging / name, data, folder / name)
            for inner in {(staging / name).parent for name in files} | {staging}:
                sync_folder(inner)
            _move_into_place(staging, target, replace)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Hide a folder at once, then delete it.

    Raises: StorageError.
    """
    with disk_errors(folder):
        doomed = _hidden_sibling(folder, ".old")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def append_line(path: Path, line: bytes) -> None:
    """Add one line to a file in one write; a reader sees it at once.

    Raises: StorageError.
    """
    with disk_errors(path), open(path, "ab", buffering=0) as file:
        if file.write(line + b"\n") != len(line) + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _move_into_place(staging: Path, target: Path, replace: bool) -> None:
    if not (replace and target.exists()):
        os.rename(staging, target)  # an empty folder gives way; one with content raises
        return
    old = _hidden_sibling(target, ".old")
    os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _hidden_sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:12]}{suffix}")


def _write_durably(temporary: Path, data: bytes, target: Path) -> None:
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(
                f"no space left on the disk for {target} ({len(data):,} bytes); nothing was changed there: "
                "free some space, or choose another disk"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raise the system's OSErrors as StorageErrors that name the target."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(f"no space left on the disk for {target}: free some, or choose another disk") from error
        if error.errno in _OCCUPIED:
            raise ExistsError(
                f"{target} exists and is not empty; overwrite it on purpose, or choose another"
            ) from error
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {target}: {reason}; choose a folder that can be written") from error
