"""A training run on the disk: its folder is written as its events come, by the command line and the server alike."""

from softprompt.runs.recorder import Facts, Recorder, require_tensorboard
from softprompt.runs.run_folder import Checkpoint, RunFolder, SavedState

__all__ = ["Checkpoint", "Facts", "Recorder", "RunFolder", "SavedState", "require_tensorboard"]
