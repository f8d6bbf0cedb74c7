"""Runs commands in forked children, one per line of stdin, and says each child's pid: a start that costs no imports.

A child is a process of its own with the whole command line in it, so `kill -9` is real; only Python's start-up and the
imports are shared.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from support.command_line import ENVIRONMENT

_ENVIRONMENT = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}  # the code that this process runs


class Forks:
    """Use as a context. `start` begins a command; `wait` gives its exit status, -9 where it was killed."""

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT
        )
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stdin.close()
        self._server.wait(10)

    def start(self, arguments: Sequence[object], log: str) -> int:
        self._server.stdin.write(json.dumps([log, *map(str, arguments)]) + "\n")
        self._server.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        self._server.stdin.write("\n")
        self._server.stdin.flush()
        return int(self._read())

    def _read(self) -> str:
        return self._server.stdout.readline()


def serve() -> None:
    importlib.import_module("softprompt.cli.train")  # and with it torch and the rest
    from softprompt.cli.main import main

    print("ready", flush=True)
    while line := sys.stdin.readline():
        log, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.argv = ["softprompt", *arguments]
            try:
                main()
            except SystemExit as ended:
                sys.stdout.flush()
                os._exit(ended.code if isinstance(ended.code, int) else 1)
        print(child, flush=True)
        sys.stdin.readline()  # until then a child that has ended keeps its pid, and can be killed without harm
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
