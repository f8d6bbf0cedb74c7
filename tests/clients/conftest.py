"""A server on the embedded base, and the programs that ask it: installed by `make test-clients`, else skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_programs import Programs
from support.app_server import served

from softprompt import load_base
from softprompt.base import Base
from softprompt.config import ServerConfig
from softprompt.embedded import prompts_folder
from softprompt.server.start import serving_app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def base() -> Base:
    return load_base("embedded", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def url(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state = tmp_path_factory.mktemp("state")
    with served(serving_app(base, ServerConfig(state=str(state), library=str(prompts_folder())), offline=True)) as url:
        yield url


@pytest.fixture(scope="session")
def programs() -> Programs:
    return Programs(Path(os.environ.get("CLIENTS", ROOT / "build" / "clients")).absolute())
