"""The threads that GNU's OpenMP keeps for each thread that computes.

Each thread that runs a parallel product gets a pool of its own, and keeps it. Where more such threads live than there
are cores, libgomp lets those that wait for work sleep at once instead of spinning for a moment
(`gomp_throttled_spin_count_var` in its `config/linux/wait.h`), and every product pays for waking them: a quarter of a
generation step and more. So whoever stops computing puts its pool away.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

_PAUSE_SOFT = 1  # omp_pause_resource_t


def put_threads_away() -> None:
    """End the calling thread's pool. Its next product makes a new one, within a hundred microseconds.

    Not to be called inside of a parallel region. Nothing happens where the library is another one than GNU's.
    """
    for library in _libraries():
        library.omp_pause_resource_all(_PAUSE_SOFT)


@cache
def _libraries() -> tuple[ctypes.PyDLL, ...]:
    """GNU's OpenMP as this process has loaded it, called without letting go of the interpreter."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        return ()
    places = sorted(set(re.findall(r"/\S*/libgomp[^/\s]*\.so[^/\s]*$", loaded, re.MULTILINE)))
    libraries = (ctypes.PyDLL(place) for place in places)
    return tuple(library for library in libraries if hasattr(library, "omp_pause_resource_all"))
