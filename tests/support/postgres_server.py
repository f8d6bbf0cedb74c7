"""A real PostgreSQL for tests: Debian's package, a database of its own on a free port of the loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
_USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root
_PATIENCE_S = 30


@contextmanager
def postgres() -> Iterator[str]:
    """Gives its URL, "postgresql://postgres@127.0.0.1:PORT/postgres". Skips the test where there is no PostgreSQL."""
    if not _PROGRAMS:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    programs = _PROGRAMS[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="softprompt-postgres-"))
    as_user = _as_user(folder)
    port = _free_port()
    try:
        subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8",
                        "--locale", "C", "--no-sync"], check=True, capture_output=True, **as_user)  # fmt: skip
        process = subprocess.Popen([programs / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder,
                                    "-h", "127.0.0.1", "-F"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   **as_user)  # fmt: skip
        try:
            _wait(process, programs / "pg_isready", port)
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # ends its connections too
            process.wait(_PATIENCE_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_user(folder: Path) -> dict[str, Any]:
    if os.getuid() != 0:
        return {}
    known = {user.pw_name: user for user in pwd.getpwall()}
    user = next(known[name] for name in _USERS if name in known)
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": folder}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port: int = place.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], is_ready: Path, port: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while subprocess.run([is_ready, "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode != 0:
        assert process.poll() is None, "PostgreSQL did not start"
        assert time.monotonic() < deadline, "PostgreSQL did not start in time"
        time.sleep(0.05)
