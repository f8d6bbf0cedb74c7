"""Keeping a training run: its folder is written as its events come, by the command line and the server alike."""

from softprompt.recording.recorder import Facts, Recorder, require_tensorboard

__all__ = ["Facts", "Recorder", "require_tensorboard"]
