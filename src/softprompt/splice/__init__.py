"""Where soft prompts meet token embeddings, masks, positions and targets: one place for training and generation."""

from softprompt.splice.concatenate import Alignment, Concatenated, Targets, concatenate
from softprompt.splice.decode import append, keep
from softprompt.splice.rows import Row

__all__ = ["Alignment", "Concatenated", "Row", "Targets", "append", "concatenate", "keep"]
