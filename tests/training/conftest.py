"""Ragged rows of words for the tiny bases."""

from __future__ import annotations

import pytest
from support.tiny_bases import random_ids


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """21 rows of 1 to 18 words, so that the last step of an epoch is a short one."""
    return [" ".join(f"w{token}" for token in random_ids(1 + (7 * seed) % 18, seed)) for seed in range(21)]


@pytest.fixture(scope="session")
def held_out() -> list[str]:
    return [" ".join(f"w{token}" for token in random_ids(4 + seed, 100 + seed)) for seed in range(5)]
