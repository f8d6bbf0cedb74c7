"""What memory there is for this process: on its device, on the machine, in its control group."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take: the least of the machine's, the control group's and its own limit."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reusable
    available = int(psutil.virtual_memory().available)
    return min(_free_address_space(), _free_in_cgroup(), available)


def _free_address_space() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 2**62 if limit == resource.RLIM_INFINITY else max(limit - int(psutil.Process().memory_info().vms), 0)


def _free_in_cgroup() -> int:
    for limit_file, usage_file in _CGROUPS:
        try:
            limit, usage = Path(limit_file).read_text().strip(), int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        return 2**62 if limit == "max" else max(int(limit) - usage, 0)
    return 2**62
