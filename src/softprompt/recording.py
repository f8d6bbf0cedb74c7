"""The former name of `softprompt.runs`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_NEW_NAMES = {"Facts": "Metadata", "Recorder": "Recorder", "require_tensorboard": "require_tensorboard"}


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _NEW_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"softprompt.runs.recorder.{_NEW_NAMES[name]}"
    warnings.warn(f"softprompt.recording.{name} is now {new}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("softprompt.runs.recorder"), _NEW_NAMES[name])
