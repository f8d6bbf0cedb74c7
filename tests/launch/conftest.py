"""One truth for all numbers of processes."""

from __future__ import annotations

from typing import Any

import driver
import pytest

from softprompt.training import Alone


@pytest.fixture(scope="session")
def truth() -> dict[str, Any]:
    """What one process finds."""
    return driver.run(Alone())
