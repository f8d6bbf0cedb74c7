"""The command line, in this process (startup costs seconds) or, where the process itself is the point, in another."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

from softprompt.cli.main import main

# What a child process needs of this one, and nothing that would load or download more.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: 1 / 0)  # strict: no NaN

    @property
    def complaint(self) -> str:
        """The one line that a refusal is, the words before it left out."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        *before, last = self.err.rstrip("\n").split("\n")
        assert last.startswith("softprompt: "), self.err
        assert not any(line.startswith("softprompt: ") for line in before), self.err
        assert self.out == ""
        return last.removeprefix("softprompt: ")


def run(*arguments: object, cwd: Path | None = None) -> Ran:
    """`softprompt ARGUMENTS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = _run(arguments, out, err, cwd)
    return Ran(code, out.getvalue(), err.getvalue())


def run_encoded(encoding: str, *arguments: object) -> Ran:
    """The same where stdout and stderr take only what `encoding` has, as PYTHONIOENCODING sets it.

    Where that is ASCII, click takes the locale for broken and writes its own lines in UTF-8.
    """
    reading = "utf-8" if encoding == "ascii" else encoding
    raw_out, raw_err = io.BytesIO(), io.BytesIO()
    out, err = (io.TextIOWrapper(raw, encoding, newline="\n", write_through=True) for raw in (raw_out, raw_err))
    code = _run(arguments, out, err, None)
    return Ran(code, raw_out.getvalue().decode(reading), raw_err.getvalue().decode(reading))


def _run(arguments: tuple[object, ...], out: TextIO, err: TextIO, cwd: Path | None) -> int:
    argv = ["softprompt", *map(str, arguments)]
    code = 0
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err), _inside(cwd):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return code


def succeed(*arguments: object, cwd: Path | None = None) -> Ran:
    ran = run(*arguments, cwd=cwd)
    assert ran.code == 0, ran.err
    return ran


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`python -m softprompt ARGUMENTS`, for real."""
    command = [sys.executable, "-m", "softprompt", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen(command, **{**pipes, **options})


def run_apart(*arguments: object, **options: Any) -> Ran:
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out, err)


@contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)
