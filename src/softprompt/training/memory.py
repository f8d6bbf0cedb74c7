"""How many rows fit into one forward and backward pass.

On a CPU the kernel kills a process that asks for too much and nothing is raised, so the rows are fitted beforehand: one
real row is run, its peak measured, and the limit read (cgroup, address-space limit, available memory). On CUDA the
error is also caught, and the batch split further.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from softprompt.base import Base, free_bytes
from softprompt.errors import MemoryLimitError
from softprompt.families import Forward
from softprompt.training.ranks import Ranks, least, most_shared
from softprompt.training.step import accumulate_gradient
from softprompt.training.trial import Trial, training_row

_USABLE_SHARE = 0.8  # of the free memory: the allocator fragments, and other processes need some too


def fit_micro_batches(
    base: Base, forward: Forward, trials: Sequence[Trial], ranks: Ranks
) -> tuple[int, tuple[str, ...]]:
    """Rows per forward pass, of all trials together: as configured, else what every rank's memory holds; and a note.

    All ranks meet here: they have read everything by now, and none has begun to write.
    Raises MemoryLimitError, on every rank, where one of them cannot hold a single row.
    """
    configured = [trial.plan.config.micro_batch_rows for trial in trials if trial.plan.config.micro_batch_rows]
    planned = sum(trial.plan.micro_batch_rows for trial in trials)
    if configured:
        return least(min(*configured, planned), ranks), ()
    whole = most_shared(planned, ranks)
    refusal = MemoryLimitError("one row does not fit into another rank's memory; use fewer processes or shorter rows")
    try:
        rows = fit_rows(lambda: _run_longest_row(base, forward, trials), whole, base.device, ranks.num_on_this_machine)
    except MemoryLimitError as error:
        rows, refusal = 0, error
    rows = least(rows, ranks)
    if rows < 1:
        raise refusal
    if rows == whole:
        return rows, ()
    return rows, (f"memory allows {rows} of {whole} rows at a time: each step is split, its sums stay the same",)


def _run_longest_row(base: Base, forward: Forward, trials: Sequence[Trial]) -> None:
    lengths = [max(len(example.ids) for example in trial.examples) for trial in trials]
    owner = lengths.index(max(lengths))
    longest = max(trials[owner].examples, key=lambda example: len(example.ids))
    config = trials[owner].plan.config
    row = replace(training_row(longest, config.eos_weight), prompt=owner)
    leaves = [trial.prompt().requires_grad_(True) for trial in trials]
    list(accumulate_gradient(base, forward, leaves, [row], 1, config.checkpoint_layers))


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
    with suppress(OSError):  # not Linux, or not allowed: the whole process's peak counts, a cautious fit
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
