"""Puts the writer of the embedded base's text within reach: it is a tool of the repository, not part of the package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "embedded"))
