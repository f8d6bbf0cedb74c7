"""One thread (two busy processes on two cores are many times slower otherwise) and the bases that many tests share.

Helpers that are called rather than injected are in `support`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from support.tiny_bases import build_base

from softprompt.base import Base, load_base

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests, and the processes that they start, a cache of their own; the user's stays as it is."""
    folder = tempfile.TemporaryDirectory(prefix="softprompt-cache-")
    config.add_cleanup(folder.cleanup)
    os.environ["SOFTPROMPT_CACHE"] = folder.name


@pytest.fixture(scope="session")
def tiny_llama() -> Base:
    return build_base("llama")


@pytest.fixture(scope="session")
def tiny_llama64() -> Base:
    return build_base("llama", dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_gpt2() -> Base:
    return build_base("gpt2")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared material is not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Base:
    return load_base(str(shared_data / "models" / "stories260K-llama"), dtype="float32", device="cpu")
