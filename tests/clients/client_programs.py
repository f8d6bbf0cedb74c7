"""Client programs in an environment of their own, which `make test-clients` makes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent


class Programs:
    """Clients in an environment of their own."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        self.node_folder = folder / "node"
        self.node = self.node_folder / "node_modules" / ".bin" / "node"

    def run(self, *command: object, timeout_s: float = 250, **environment: str) -> str:
        """A program's standard output; the test fails with its standard error."""
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **environment}
        done = subprocess.run(
            [str(part) for part in command], env={**os.environ, **quiet}, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        return done.stdout

    def need_python(self, package: str) -> None:
        found = self.python.exists() and not subprocess.run(
            [self.python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"],
            check=False,
        ).returncode  # fmt: skip
        if not found:
            pytest.skip(f"{package} is not installed in {self.python.parent.parent}; run make test-clients")

    def need_node(self, package: str) -> None:
        if shutil.which("npm") is None:
            pytest.skip("there is no npm on this machine to install it with")
        if not (self.node_folder / "node_modules" / package).exists():
            pytest.skip(f"{package} is not installed in {self.node_folder}; run make test-clients")
