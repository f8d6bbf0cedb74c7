"""Soft prompts on disk: PEFT adapter folders, a library of them, the Hub.

Objects in, files out, and back. What is written is there whole or not at all; what is read is checked first and never
run. This package knows nothing of data, training, engines or HTTP; it touches a base only to compare its width, its
head and its fingerprint.
"""

import importlib
import warnings
from typing import Any

from softprompt.storage.adapter import UnknownBaseWarning, load_prompt
from softprompt.storage.hub import pull_prompt, push_prompt
from softprompt.storage.library import (
    Check,
    Library,
    LibraryEntry,
    check_name,
    is_set,
    load_set,
    resolve_prompt,
    save_set,
)
from softprompt.storage.save import save_prompt

__all__ = [
    "Check",
    "Library",
    "LibraryEntry",
    "UnknownBaseWarning",
    "check_name",
    "is_set",
    "load_prompt",
    "load_set",
    "pull_prompt",
    "push_prompt",
    "resolve_prompt",
    "save_prompt",
    "save_set",
]

_MOVED_TO_RUNS = ("Checkpoint", "RunFolder", "SavedState")


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _MOVED_TO_RUNS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"softprompt.storage.{name} is now softprompt.runs.{name}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("softprompt.runs"), name)
