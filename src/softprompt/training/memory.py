"""How many rows one forward and backward may hold.

On a CPU the kernel kills a process that asks for too much and nothing is raised, so the rows are fitted beforehand: one
real row is run, its peak measured, and the limit read (cgroup, address-space limit, available memory). On CUDA the
error is also caught, and the batch split further.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from softprompt.base import free_bytes
from softprompt.errors import MemoryLimitError

_USABLE_SHARE = 0.8  # of what is free: the allocator fragments, and others live on the machine too


def fit_rows(run_one_row: Callable[[], None], wanted_rows: int, device: torch.device, num_sharing: int = 1) -> int:
    """Rows per micro-batch, at most `wanted_rows`, from the measured peak of the longest row.

    `num_sharing` processes do the same on this machine, and on a CPU take from the same memory.
    Raises MemoryLimitError where even one row takes more than there is.
    """
    if device.type == "mps":
        return wanted_rows
    free = free_bytes(device) // (num_sharing if device.type == "cpu" else 1)
    peak = _measured_peak(run_one_row, device)
    rows = int(free * _USABLE_SHARE // max(peak, 1))
    if rows < 1:
        raise MemoryLimitError(
            f"one row takes {peak / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; use shorter rows "
            "(--max-length), bfloat16 or a smaller base"
        )
    return min(rows, wanted_rows)


def _measured_peak(run: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    _return_free_heap()
    before = _reset_peak()
    run()
    return peak_bytes() - before


def _return_free_heap() -> None:
    """Give freed memory back to the kernel: were it resident, the row would reuse it and its peak look small."""
    with suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int:
    """Make the kernel count the peak from now on (Linux, since 4.0); what is resident now."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the whole process's peak counts, a cautious fit
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Peak resident size of this process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
