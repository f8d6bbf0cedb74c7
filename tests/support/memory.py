"""How much memory of Python's something keeps."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable


def kept_bytes(act: Callable[[], object]) -> int:
    """Bytes that are allocated while `act` runs, and still are when it has returned."""
    gc.collect()
    tracemalloc.start()
    try:
        act()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
