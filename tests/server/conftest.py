"""What the server's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from openai import OpenAI
from support.fault_server import Servers
from support.job_server import job_server

from softprompt.base import Base


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """`softprompt serve` in processes of their own; the imports, which take seconds, are shared."""
    with Servers(tmp_path_factory.mktemp("servers")) as found:
        yield found


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server of jobs, for a module's tests."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(tiny_llama: Base, state: Path) -> Iterator[tuple[OpenAI, FastAPI]]:
    """A client of a server that runs jobs on the tiny base, and its application."""
    with job_server(tiny_llama, state) as found:
        yield found
