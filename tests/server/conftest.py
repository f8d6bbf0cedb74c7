"""What the server's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fault_server import Servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """`softprompt serve` in processes of their own; the imports, which take seconds, are shared."""
    with Servers(tmp_path_factory.mktemp("servers")) as found:
        yield found
