"""docs/cli.md says what the commands say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "cli_reference.py"


def test_the_command_line_page_is_as_generated() -> None:
    """In a process of its own: click keeps a command's help option from whoever asked for it first."""
    code = f"import runpy, sys; sys.stdout.write(runpy.run_path({str(TOOL)!r})['reference']())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == ran.stdout, "python tools/cli_reference.py"
