"""What an architecture needs to run over embeddings."""

from softprompt.families.checkpoint import decoder_layers
from softprompt.families.exactness import forward_of
from softprompt.families.forward import Forward, ModelCache
from softprompt.families.head import Head
from softprompt.families.held import CachedBatch, KVBuffer, QueryChunk, batch_order, cached_batch
from softprompt.families.known import TESTED_FAMILIES
from softprompt.families.native import has_native_attention
from softprompt.families.packed import KeysValues, PackedBatch, Segment
from softprompt.families.products import FrozenLinearKernels, PackedWeight

__all__ = [
    "TESTED_FAMILIES", "CachedBatch", "Forward", "FrozenLinearKernels", "Head", "KVBuffer", "KeysValues", "ModelCache",
    "PackedBatch", "PackedWeight", "QueryChunk", "Segment", "batch_order", "cached_batch", "decoder_layers",
    "forward_of",
    "has_native_attention",
]  # fmt: skip
