"""Soft prompts on disk: PEFT adapter folders, a library of them, a run's folder, the Hub.

Objects in, files out, and back. What is written is there whole or not at all; what is read is checked first and never
run. This room knows nothing of data, training, engines or HTTP; it touches a base only to compare its width and
fingerprint.
"""

from softprompt.storage.adapter import UnknownBaseWarning, load_prompt, save_prompt
from softprompt.storage.checkpoints import Checkpoint, SavedState
from softprompt.storage.hub import pull_prompt, push_prompt
from softprompt.storage.library import Check, Library, LibraryEntry, check_name, resolve_prompt
from softprompt.storage.prompt_set import is_set, load_set, save_set
from softprompt.storage.runs import RunFolder

__all__ = [
    "Check",
    "Checkpoint",
    "Library",
    "LibraryEntry",
    "RunFolder",
    "SavedState",
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
