"""Where soft prompts meet token embeddings, masks, positions and targets: one place for training and generation."""

from softprompt.splice.concatenate import Alignment, Concatenated, concatenate
from softprompt.splice.pack import Packed, Prefix, pack, pack_prompts
from softprompt.splice.rows import Row
from softprompt.splice.run import run_prompts, target_states
from softprompt.splice.stretch import TokenSpan, embed_spans
from softprompt.splice.targets import Targets

__all__ = [
    "Alignment", "Concatenated", "Packed", "Prefix", "Row", "Targets", "TokenSpan", "concatenate", "embed_spans",
    "pack", "pack_prompts", "run_prompts", "target_states",
]  # fmt: skip
