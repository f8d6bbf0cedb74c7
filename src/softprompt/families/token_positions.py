"""Positions of a forward's tokens, for families whose modules count them by themselves, from 0 in every forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_THREAD = threading.local()


@contextmanager
def token_positions(positions_S: Tensor) -> Iterator[None]:
    """Inside it the position tables that this thread looks up give the entries of these positions."""
    before = given_positions()
    _THREAD.positions = positions_S
    try:
        yield
    finally:
        _THREAD.positions = before


def given_positions() -> Tensor | None:
    """[S], or None where a module counts for itself."""
    found: Tensor | None = getattr(_THREAD, "positions", None)
    return found
