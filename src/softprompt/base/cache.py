"""What is known of this machine and of its bases, in small JSON files under the user's cache directory.

A cache only saves time: a folder or file that cannot be read or written counts as an empty one, and nothing is raised.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

VARIABLE = "SOFTPROMPT_CACHE"  # the folder; empty for no cache at all
_LOCK_TIMEOUT_S = 10.0
Known = dict[str, Any]  # Any: whatever JSON stores


def cache_folder() -> Path | None:
    """$SOFTPROMPT_CACHE, else `softprompt` in $XDG_CACHE_HOME or ~/.cache; None where there is to be none.

    It is made by the first `update_cached`, and may be one that cannot be written.
    """
    own = os.environ.get(VARIABLE)
    if own is not None:
        return Path(own).expanduser() if own else None
    shared = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # a user without a home
        return (Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache") / "softprompt"
    return None


def read_cached(name: str) -> Known:
    """The JSON object in the cache's file `name`; empty where there is none that can be read."""
    folder = cache_folder()
    with suppress(OSError, ValueError):
        found = json.loads((folder / name).read_text(encoding="utf-8")) if folder is not None else {}
        return found if isinstance(found, dict) else {}
    return {}


def update_cached(name: str, change: Callable[[Known], Known]) -> Known:
    """Replace the file's object by `change` of it, one process at a time, each of which sees what the last one wrote.

    Returns what `change` returned, also where it cannot be written. A reader gets the old file or the new one, whole.
    """
    folder = cache_folder()
    if folder is None:
        return change({})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock", timeout=_LOCK_TIMEOUT_S)
        lock.acquire()
    except (OSError, Timeout):
        return change(read_cached(name))
    try:
        known = change(read_cached(name))
        with suppress(OSError):
            _replace(folder / name, json.dumps(known, sort_keys=True, indent=1).encode())
        return known
    finally:
        lock.release()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
