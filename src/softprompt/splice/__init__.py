"""Where soft prompts meet token embeddings, masks, positions and targets: one place for training and generation."""

from softprompt.splice.concatenate import Alignment, Concatenated, concatenate
from softprompt.splice.embed import Row, Targets, TokenSpan, embed_spans
from softprompt.splice.run import Prefix, column_states, run_prompts, target_states

__all__ = [
    "Alignment", "Concatenated", "Prefix", "Row", "Targets", "TokenSpan", "column_states", "concatenate", "embed_spans",
    "run_prompts", "target_states",
]  # fmt: skip
