"""The state folder: clients' files, prompts and the hashes of their keys lie in it, so nobody else may look into it."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from softprompt.errors import StorageError

DATABASE, LOCK = "softprompt.db", "server.lock"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OF_A_NEW_DISK = "lost+found"

_log = logging.getLogger(__name__)


def make_private(folder: Path) -> None:
    """Make the folder with mode 0700, or take the rights of others from one that exists.

    Raises StorageError where it cannot be made or closed, or where it holds other things, which others may need.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot make the state folder {folder}: {reason}; choose another") from error
    if mode & _OTHERS:
        _close(folder, mode)


def _close(folder: Path, mode: int) -> None:
    found = f"the state folder {folder} is open to other users (mode {mode:04o})"
    try:
        if not _is_own(folder):
            raise StorageError(f"{found} and holds other things; name a folder of its own, or run chmod 700 on it")
        folder.chmod(mode & ~_OTHERS)
    except PermissionError as error:
        raise StorageError(f"{found}, and only its owner can close it; name a folder inside it") from error
    _log.warning("%s; it is closed to them now", found)


def _is_own(folder: Path) -> bool:
    """Whether it is a state folder already, or empty."""
    names = {path.name for path in folder.iterdir()}
    return bool(names & {DATABASE, LOCK}) or names <= {_OF_A_NEW_DISK}
