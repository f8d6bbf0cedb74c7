"""What a launcher (ours, `accelerate launch`, torchrun) leaves in the environment of each process. Imports no torch."""

from __future__ import annotations

import os

PEERS_LEFT = 3  # exit code of a process that ends because another has: it has nothing to say itself
RENDEZVOUS = "SOFTPROMPT_RENDEZVOUS"  # the file through which processes of our own launcher find each other


def num_processes() -> int:
    """How many processes the launcher started, on all machines; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def num_processes_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or num_processes())


def rank() -> int:
    """This process's number among all of them; 0 is the one that writes and speaks."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """Its number on this machine, which is that of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK") or rank())


def speaks() -> bool:
    """Whether this process may complain: the first one, and all that our own launcher started, which picks."""
    return rank() == 0 or RENDEZVOUS in os.environ


def wants_cpu() -> bool:
    return _is_true("ACCELERATE_USE_CPU")


def wants_fsdp() -> bool:
    """Whether Accelerate's configuration asks to split the base over the processes."""
    return _is_true("ACCELERATE_USE_FSDP")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
