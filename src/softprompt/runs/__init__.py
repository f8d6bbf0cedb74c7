"""Training runs: their folder, its recorder, its history, and the session that trains, records and resumes one.

The folder is read and written without the rest: `softprompt.runs.recorder` and `softprompt.runs.session` import the
training, this package does not.
"""

from softprompt.runs.run_folder import Checkpoint, RunFolder, SavedState

__all__ = ["Checkpoint", "RunFolder", "SavedState"]
