"""The former name of `softprompt.runs`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_NAMES = ("Facts", "Recorder", "require_tensorboard")


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"softprompt.recording.{name} is now softprompt.runs.{name}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("softprompt.runs"), name)
