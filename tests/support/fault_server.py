"""`softprompt serve` in processes that can be killed: forked from one that has imported everything already.

A child is a process of its own with the whole command line in it; only Python's start and the imports are shared.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
_URL = re.compile(r"^(http://\S+)/v1 serves", re.MULTILINE)
_START_S = 60.0
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare


@dataclass
class Serving:
    """A server's process."""

    pid: int
    log: Path
    url: str = ""

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def memory_mib(self) -> float:
        """Resident."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def is_alive(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def seen(self, path: Path) -> Path:
        """A path as the process sees it, which may have mounted something there."""
        return Path(f"/proc/{self.pid}/root{path}")


class Servers:
    """Use as a context. What still runs at its end is killed."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._num_started = 0
        self._running: list[Serving] = []

    def __enter__(self) -> Servers:
        self._forker = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT
        )
        assert self._read() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._running.copy():
            self.kill(each)
        assert self._forker.stdin is not None and self._forker.stdout is not None
        self._forker.stdin.close()
        self._forker.wait(10)
        self._forker.stdout.close()

    def begin(self, base: Path, *flags: object, disk: tuple[Path, str] | None = None) -> Serving:
        """Start one, and do not wait until it is ready. `disk`: a folder where it alone sees a disk of that size."""
        self._num_started += 1
        log = self._logs / f"server-{self._num_started}.log"
        wanted = {"log": str(log), "disk": None if disk is None else [str(disk[0]), disk[1]],
                  "flags": ["--base", str(base), "--device", "cpu", "--dtype", "float32", "--port", "0",
                            *map(str, flags)]}  # fmt: skip
        found = Serving(int(self._told(wanted)), log)
        self._running.append(found)
        return found

    def start(self, base: Path, *flags: object, disk: tuple[Path, str] | None = None) -> Serving:
        """Start one; returns when it takes requests."""
        serving = self.begin(base, *flags, disk=disk)
        ends = time.monotonic() + _START_S
        while (found := _URL.search(serving.said)) is None:
            assert time.monotonic() < ends and serving.is_alive, serving.said
            time.sleep(0.01)
        serving.url = found[1]
        return serving

    def kill(self, serving: Serving, how: int = signal.SIGKILL) -> int:
        """Its exit status, -9 where it was killed."""
        self._running.remove(serving)
        os.kill(serving.pid, how)
        return int(self._told({"wait": serving.pid}))

    def _told(self, wanted: dict[str, object]) -> str:
        assert self._forker.stdin is not None
        self._forker.stdin.write(json.dumps(wanted) + "\n")
        self._forker.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._forker.stdout is not None
        return self._forker.stdout.readline().strip()


def save_base(folder: Path, **changes: Any) -> Path:  # Any: of the model's config
    """A tiny base on the disk."""
    from support.tiny_bases import build_model, build_tokenizer

    build_model("llama", **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def can_mount() -> bool:
    """Whether a process may have a disk of its own here."""
    try:
        return subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]).returncode == 0
    except FileNotFoundError:
        return False


def _fork_when_told() -> None:
    for name in ("server.start", "server.lifecycle", "cli.console", "cli.serve", "embedded", "base", "storage"):
        importlib.import_module(f"softprompt.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        if "wait" in wanted:  # until then a child that has ended keeps its pid, and can be killed without harm
            print(os.waitstatus_to_exitcode(os.waitpid(wanted["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _serve(**wanted)
        print(child, flush=True)


def _serve(log: str, disk: Sequence[str] | None, flags: Sequence[str]) -> None:
    from softprompt.cli.main import main

    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if disk is not None:
            _mount(*disk)
        sys.argv = ["softprompt", "serve", *flags]
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def _mount(folder: str, size: str) -> None:
    """A small disk that this process alone sees; its user is root there, and remains itself for files."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)


if __name__ == "__main__":
    _fork_when_told()
