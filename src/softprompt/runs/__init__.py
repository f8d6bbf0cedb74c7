"""A training run on the disk: one session for `train`, `sweep`, `demo` and jobs, which records and resumes it."""

from softprompt.runs.recorder import Recorder, require_tensorboard
from softprompt.runs.run_folder import Checkpoint, RunFolder, SavedState
from softprompt.runs.session import (
    SessionStopped,
    TrainingSession,
    TrainingTask,
    best_of,
    rows_metadata,
    tasks_metadata,
)

__all__ = [
    "Checkpoint",
    "Recorder",
    "RunFolder",
    "SavedState",
    "SessionStopped",
    "TrainingSession",
    "TrainingTask",
    "best_of",
    "require_tensorboard",
    "rows_metadata",
    "tasks_metadata",
]
