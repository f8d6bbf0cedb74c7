"""The threads that GNU's OpenMP keeps for each thread that computes, and how they wait for each other.

Each thread that runs a parallel product gets a pool of its own, and keeps it. Where more such threads live than there
are cores, libgomp lets those that wait for work sleep at once instead of spinning for some milliseconds
(`gomp_throttled_spin_count_var` in its `config/linux/wait.h`). Both ways have their price. On a quiet machine,
sleeping makes every product wake a thread, which costs a fifth of a generation step and more: whoever stops computing
puts its pool away. On a machine with other busy processes, spinning takes the cores from the very threads that are
waited for, and steps become up to ten times as slow: so while this process waits for cores that others use,
a monitor keeps a spare pool that sleeps, and all waits are short. As many threads compute as before, with the same
results.

Any OMP_WAIT_POLICY or GOMP_SPINCOUNT that the user has set stays as it is.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

_PAUSE_SOFT = 1  # omp_pause_resource_t
_INTERVAL_S = 0.5  # between two looks at how long this process waited for its cores
_BUSY = 0.28  # of the time that its threads wanted to run: from here on waits are short
_QUIET = 0.18  # and below this they spin again
_OTHERS_BUSY, _OTHERS_QUIET = 0.4, 0.2  # cores that others use: a process that waits for its own threads is not busy
_USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def release_omp_threads() -> None:
    """End the calling thread's pool. Its next product makes a new one: of two threads, 0.05 ms for both together.

    Not to be called inside of a parallel region. Nothing happens where the library is another one than GNU's.
    """
    for library in _libraries():
        library.omp_pause_resource_all(_PAUSE_SOFT)


@cache
def adapt_waiting_to_load() -> None:
    """Start this process's `LoadMonitor`, once: nothing where OpenMP is not GNU's or has one thread, where the user has
    chosen how threads wait, or where Linux does not count the time that threads wait for a core.
    """
    if any(name in os.environ for name in _USERS_OWN) or not _libraries() or not any(_schedstats()):
        return
    if max(library.omp_get_max_threads() for library in _libraries()) > 1:
        threading.Thread(target=LoadMonitor().run, name="openmp-load-monitor", daemon=True).start()


class Times(NamedTuple):
    """Seconds since some moment in the past."""

    waited_s: float  # that this process's threads were ready to run and had no core
    computed_s: float  # that they ran
    others_s: float  # that all other processes of the machine ran
    clock_s: float


class LoadMonitor:
    """Keeps waits short while other processes take the cores. All its methods belong to one thread."""

    def __init__(self, times: Callable[[], Times] | None = None) -> None:
        self.is_busy = False
        self._times = times or _times
        self._before = self._times()

    def run(self) -> None:
        while True:
            time.sleep(_INTERVAL_S)
            self.look()

    def look(self) -> None:
        """Compare what was waited since the last look with what was computed. An idle process says nothing."""
        before, now = self._before, self._times()
        wanted_s = now.waited_s + now.computed_s - before.waited_s - before.computed_s
        if wanted_s < _INTERVAL_S / 10:
            return
        self._before = now
        share = (now.waited_s - before.waited_s) / wanted_s
        others = (now.others_s - before.others_s) / max(now.clock_s - before.clock_s, 1e-9)
        if not self.is_busy and share >= _BUSY and others >= _OTHERS_BUSY:
            self.is_busy = True
            _make_spare_pool()
        elif self.is_busy and (share < _QUIET or others < _OTHERS_QUIET):
            self.is_busy = False
            release_omp_threads()


def load_warning() -> str | None:
    """A sentence for a user whose cores are taken by other processes; None where they are not, or nobody knows."""
    cores = os.cpu_count() or 1
    with suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
        if load > cores:
            return f"other processes keep this machine's {cores} cores busy (load {load:.1f}); this will take longer"
    return None


def _make_spare_pool() -> None:
    """A pool for the calling thread with which there are more OpenMP threads than cores. All of them sleep."""
    for library in _libraries():
        nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)  # a function that every thread may call
        library.GOMP_parallel(nothing, None, ctypes.c_uint(library.omp_get_num_procs() + 1), ctypes.c_uint(0))


def _times() -> Times:
    machine, computed_s = psutil.cpu_times(), time.process_time()
    ran_s = machine.user + machine.nice + machine.system
    return Times(sum(_schedstats()) * 1e-9, computed_s, ran_s - computed_s, time.monotonic())


def _schedstats() -> Iterator[int]:
    """Nanoseconds that each thread of this process was ready to run and had no core (Linux: proc(5), schedstat)."""
    with suppress(OSError):
        for task in os.scandir("/proc/self/task"):
            with suppress(OSError, ValueError, IndexError):  # a thread that has ended meanwhile
                yield int(Path(task.path, "schedstat").read_text().split()[1])


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
