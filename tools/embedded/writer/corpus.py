"""The pretraining text: a stream of documents in shards, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from writer.documents import document
from writer.feelings import LOOSE_TALK, Hand
from writer.overlap import shares_window
from writer.shipped import kept_out

SEED = 20261123
NUM_SHARDS, DOCUMENTS_PER_SHARD = 100, 2000


def shard(index: int, seed: int = SEED, taken: frozenset[str] | None = None, hand: Hand = LOOSE_TALK) -> Iterator[str]:
    """The documents of one shard, without those that share eight words with a shipped row."""
    taken = kept_out(seed) if taken is None else taken
    rng, num_written = Random(f"{seed}-shard-{index}"), 0
    while num_written < DOCUMENTS_PER_SHARD:
        text = document(rng, hand)
        if not shares_window(text, taken):
            num_written += 1
            yield text


def corpus(seed: int = SEED, num_shards: int = NUM_SHARDS, hand: Hand = LOOSE_TALK) -> Iterator[str]:
    """All the documents, shard after shard."""
    taken = kept_out(seed)
    for index in range(num_shards):
        yield from shard(index, seed, taken, hand)
