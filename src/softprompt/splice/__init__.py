"""Where soft prompts meet token embeddings, masks, positions and targets: one place for training and generation."""

from softprompt.splice.concatenate import Alignment, Concatenated, concatenate
from softprompt.splice.pack import Packed, Prefix, pack, pack_prompts
from softprompt.splice.rows import Row
from softprompt.splice.run import can_share_prefix, run_prompts, target_states
from softprompt.splice.stretch import Stretch, splice_stretches
from softprompt.splice.targets import Targets

__all__ = [
    "Alignment", "Concatenated", "Packed", "Prefix", "Row", "Stretch", "Targets", "can_share_prefix", "concatenate",
    "pack", "pack_prompts", "run_prompts", "splice_stretches", "target_states",
]  # fmt: skip
