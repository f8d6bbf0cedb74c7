"""What an architecture needs to run over embeddings."""

from softprompt.families.batch import (
    CachedBatch,
    CrossBatch,
    PackedBatch,
    QueryChunk,
    Segment,
    batch_order,
    cached_batch,
)
from softprompt.families.cached_attention import has_native_attention
from softprompt.families.exactness import TESTED_FAMILIES, forward_of
from softprompt.families.forward import Forward, ModelCache, Packing
from softprompt.families.frozen_linear import FrozenLinearKernels, PackedWeight
from softprompt.families.head import Head
from softprompt.families.kernel_choice import KernelTable, kernel_table, this_machine
from softprompt.families.kv_buffer import KeysValues, KVBuffer
from softprompt.families.patches import decoder_layers
from softprompt.families.probes import is_close
from softprompt.families.seq2seq import Seq2SeqForward, seq2seq_forward

__all__ = [
    "TESTED_FAMILIES",
    "CachedBatch",
    "CrossBatch",
    "Forward",
    "FrozenLinearKernels",
    "Head",
    "KVBuffer",
    "KernelTable",
    "KeysValues",
    "ModelCache",
    "PackedBatch",
    "PackedWeight",
    "Packing",
    "QueryChunk",
    "Segment",
    "Seq2SeqForward",
    "batch_order",
    "cached_batch",
    "decoder_layers",
    "forward_of",
    "has_native_attention",
    "is_close",
    "kernel_table",
    "seq2seq_forward",
    "this_machine",
]  # fmt: skip
