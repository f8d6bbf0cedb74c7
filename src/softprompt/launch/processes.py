"""Start a command several times on this machine, as one: one output, one exit code, one Ctrl-C. Imports no torch.

Each process is the command itself, with the variables that Accelerate and torchrun set. It is not started through
`accelerate launch`: on CPUs that starts a single process whatever number it is given, and elsewhere its agent prints a
traceback of its own for every failure, ends the processes before the first of them has reported its error, and passes
Ctrl-C to all. `accelerate launch --multi_gpu -m softprompt train ...` works too; it was never run on several machines.

The processes meet through a file and talk over the loopback interface: no port is open to others.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from softprompt.errors import ConfigError, MissingDependencyError

PEERS_LEFT = 3  # exit code of a process that ends because another has: it has no error of its own to report
RENDEZVOUS = "SOFTPROMPT_RENDEZVOUS"  # the file through which processes of our own launcher find each other


def world_size() -> int:
    """How many processes the launcher started, on all machines; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def rank() -> int:
    """This process's number among all of them; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """Its number on this machine, which is that of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK") or rank())


def may_report_errors() -> bool:
    """Whether this process may complain: the first one, and all that our own launcher started, which picks."""
    return rank() == 0 or RENDEZVOUS in os.environ


def wants_cpu() -> bool:
    return _is_true("ACCELERATE_USE_CPU")


def wants_fsdp() -> bool:
    """Whether Accelerate's configuration asks to split the base over the processes."""
    return _is_true("ACCELERATE_USE_FSDP")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


_POLL_S = 0.05
_PATIENCE_S = 30.0  # for the others, once one process has ended
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_PASSED_TO_ALL = (signal.SIGTERM, signal.SIGHUP)


def run_processes(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `softprompt ARGUMENTS` in so many processes that train together; the exit code for the shell.

    `--processes N` is left out of the arguments. Raises ConfigError for a number below 1 or inside a launcher's
    process, and MissingDependencyError without accelerate.
    """
    if num_processes < 1:
        raise ConfigError(f"processes is {num_processes}; it must be at least 1")
    if world_size() > 1:
        raise ConfigError(
            f"this is already one of {world_size()} processes that a launcher started; leave --processes out"
        )
    if num_processes > 1 and find_spec("accelerate") is None:
        raise MissingDependencyError("several processes need accelerate; pip install 'softprompt[distributed]'")
    command = [sys.executable, "-m", "softprompt", *without_option(arguments, "--processes")]
    return run_group(command, num_processes)


def run_group(command: Sequence[str], num_processes: int) -> int:
    """Run a command in so many processes; the first one's output is ours, the others' is suppressed.

    Ctrl-C goes to the first process, which decides; a termination goes to all. If another process fails and the first
    reports no error, that process's own output is shown.
    """
    group: list[_Member] = []
    with tempfile.TemporaryDirectory(prefix="softprompt-") as folder, _signals_passed_to(group):
        try:
            for rank in range(num_processes):
                group.append(_start(command, rank, num_processes, Path(folder)))
            return _outcome(group, _wait(group))
        finally:
            _end(group)


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without an option and its value, in either form."""
    left: list[str] = []
    is_value = False
    for argument in arguments:
        if not (is_value or argument == name or argument.startswith(f"{name}=")):
            left.append(argument)
        is_value = argument == name and not is_value
    return left


@dataclass(frozen=True)
class _Member:
    rank: int
    process: subprocess.Popen[bytes]
    words: Path  # what it wrote to stderr; the first one writes to ours

    @property
    def has_failed(self) -> bool:
        """By itself, not because another had gone."""
        return self.process.poll() not in (None, 0, PEERS_LEFT)

    @property
    def has_aborted(self) -> bool:
        """As threads of torch's collectives do at times when another process has left."""
        return self.process.poll() == -signal.SIGABRT


def _start(command: Sequence[str], rank: int, count: int, folder: Path) -> _Member:
    words = folder / f"stderr-{rank}"
    variables = _variables(rank, count, folder)
    if rank == 0:
        return _Member(rank, subprocess.Popen(command, env=variables, start_new_session=True), words)
    nothing = subprocess.DEVNULL
    with words.open("wb") as file:
        process = subprocess.Popen(
            command, env=variables, stdin=nothing, stdout=nothing, stderr=file, start_new_session=True
        )
    return _Member(rank, process, words)


def _variables(rank: int, count: int, folder: Path) -> dict[str, str]:
    import psutil

    threads = max((psutil.cpu_count(logical=False) or 1) // count, 1)
    return {
        "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK,
        **os.environ,
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        RENDEZVOUS: str(folder / "rendezvous"),
    }  # fmt: skip


@contextlib.contextmanager
def _signals_passed_to(group: Sequence[_Member]) -> Iterator[None]:
    def to_first(number: int, frame: FrameType | None) -> None:
        for member in group[:1]:
            member.process.send_signal(number)

    def to_all(number: int, frame: FrameType | None) -> None:
        for member in group:
            member.process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, to_all) for number in _PASSED_TO_ALL}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, to_first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(group: Sequence[_Member]) -> _Member | None:
    """Until the first process has ended, or hangs because another failed; gives the one that failed first, if any."""
    failed: _Member | None = None
    give_up = math.inf
    while group[0].process.poll() is None and time.monotonic() < give_up:
        failed = failed or _failed(group)
        give_up = min(give_up, time.monotonic() + _PATIENCE_S) if failed is not None else math.inf
        time.sleep(_POLL_S)
    _let_others_end(group)
    if failed is None or failed.has_aborted:
        return _failed(group)
    return failed


def _failed(group: Sequence[_Member]) -> _Member | None:
    """The first that failed by itself; one that aborted only if no other did, whose end it may be the result of."""
    failed = [member for member in group if member.has_failed]
    return min(failed, key=lambda member: member.has_aborted, default=None)


def _let_others_end(group: Sequence[_Member]) -> None:
    """By themselves, where the first process went well, has lost them, or aborted as it may when it loses them."""
    give_up = time.monotonic() + _PATIENCE_S
    while group[0].process.poll() in (0, PEERS_LEFT, -signal.SIGABRT) and time.monotonic() < give_up:
        if all(member.process.poll() is not None for member in group):
            return
        time.sleep(_POLL_S)


def _outcome(group: Sequence[_Member], failed: _Member | None) -> int:
    """The exit code; reports a failure first, if the first process could not."""
    first = group[0].process.poll()
    if first in (0, -signal.SIGTERM) or failed is None:
        return _shell_code(first)
    first_has_spoken = first is not None and first > 0 and first != PEERS_LEFT
    if not first_has_spoken:
        sys.stderr.write(_words_of(failed, len(group)))
    return _shell_code(first if first_has_spoken else failed.process.poll())


def _words_of(failed: _Member, count: int) -> str:
    code = failed.process.poll()
    if code is not None and code > 0 and failed.rank > 0:
        return failed.words.read_text(encoding="utf-8", errors="replace")
    name = signal.Signals(-code).name if code is not None and code < 0 else "an unknown cause"
    return (
        f"softprompt: process {failed.rank} of {count} was ended by {name}; if memory ran out, use fewer processes, "
        "shorter rows or a smaller base\n"
    )


def _shell_code(code: int | None) -> int:
    """Of a process that a signal ended, 128 and its number; 1 where the others left without a word."""
    if code is None or code == PEERS_LEFT:
        return 1
    return code if code >= 0 else 128 - code


def _end(group: Sequence[_Member]) -> None:
    """Nothing that we started outlives us."""
    for member in group:
        if member.process.poll() is None:
            member.process.kill()
        member.process.wait()
