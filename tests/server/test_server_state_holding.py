"""One server per state, also after the last one was killed; the tables travel with the package."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from support.tiny_bases import build_base

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError, StorageError
from softprompt.server.start import serving_app
from softprompt.server.state import migrations
from softprompt.server.state.database import Database
from softprompt.server.state.lock import exclusive

_HOLD = """
import pathlib, sys
from softprompt.server.state.database import Database
from softprompt.server.state.lock import exclusive
folder = pathlib.Path(sys.argv[1])
with exclusive(folder, Database.in_folder(folder)):
    print("held", flush=True)
    sys.stdin.read()
"""


def app(state: Path) -> FastAPI:
    return serving_app(build_base(), ServerConfig(state=str(state)))


async def start(app: FastAPI) -> None:
    async with app.router.lifespan_context(app):
        pass


def test_a_second_server_does_not_start(tmp_path: Path) -> None:
    async def start_two() -> None:
        one, two = app(tmp_path), app(tmp_path)
        async with one.router.lifespan_context(one):
            with pytest.raises(StorageError, match="another server works on the state folder"):
                await start(two)
        await start(app(tmp_path))

    asyncio.run(start_two())


def test_a_killed_servers_lock_is_released(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"held\n"
    database = Database.in_folder(tmp_path)
    with pytest.raises(StorageError), exclusive(tmp_path, database):
        pass
    process.kill()
    process.wait(10)
    process.stdout.close()
    process.stdin.close()
    with exclusive(tmp_path, database):
        pass
    database.close()


def test_a_state_folder_is_its_owners_alone(tmp_path: Path) -> None:
    Database.in_folder(tmp_path / "state").close()
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_server_for_others_does_not_start_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none in the database"):
        serving_app(build_base(), ServerConfig(state=str(tmp_path), host="0.0.0.0"))


def test_every_migration_is_in_a_package() -> None:
    """A folder without __init__.py would be left out of the wheel."""
    place = Path(migrations.__file__).parent
    assert (place / "versions" / "__init__.py").is_file()
    assert list((place / "versions").glob("r0001_*.py"))
