"""The device and dtype that `auto` means on this machine, and the memory that is free for this process."""

from __future__ import annotations

import hashlib
import platform
import resource
from pathlib import Path

import psutil
import torch

from softprompt.config import Dtype
from softprompt.errors import ConfigError

_FAST_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there. Raises ConfigError for a device that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not one that torch knows; use auto, cpu, cuda, cuda:N or mps") from error
    _require_present(device)
    return device


def _require_present(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available on this machine; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {str(device)!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not available on this machine; use cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {str(device)!r} is not supported; use auto, cpu, cuda, cuda:N or mps")


def resolve_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where this device is fast at it, else float32; float16 is refused on a CPU."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError("dtype float16 on a CPU loses precision and is slow; use float32 or bfloat16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def has_fast_bfloat16(device: torch.device) -> bool:
    """CUDA with native bfloat16, or a CPU with AMX or AVX512-BF16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(_FAST_BF16_FLAGS & _cpu_flags())


def processor() -> str:
    """The processor's name and a digest of what it can do, so that two with one name differ where their speed may."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    kind = [*sorted(_cpu_flags()), *(_cpuinfo(field) for field in ("cpu family", "model", "stepping"))]
    return f"{name} ({hashlib.sha256(' '.join(kind).encode()).hexdigest()[:8]})"


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.exists():
        return ""
    lines = [line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[1].strip() for line in lines if len(line) == 2 and line[0].strip() == field), "")


CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still allocate: the least of the limits of machine, control group and process."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reusable
    available = int(psutil.virtual_memory().available)
    return min(_free_address_space(), _free_in_cgroup(), available)


def _free_address_space() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 2**62 if limit == resource.RLIM_INFINITY else max(limit - int(psutil.Process().memory_info().vms), 0)


def _free_in_cgroup() -> int:
    for limit_file, usage_file in CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text().strip(), int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        return 2**62 if limit == "max" else max(int(limit) - usage, 0)
    return 2**62
