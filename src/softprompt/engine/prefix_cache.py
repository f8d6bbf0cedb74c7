"""Keys and values of soft prompts, and of beginnings of texts that several requests share: computed once, kept within
a budget.

The key of an entry is a hash of what was run: the soft prompt's content and the token ids behind it. With token ids the
request's salt is part of it, too: the time to the first token shows whether a text was cached, so only requests with
the same salt share texts. The least recently used entries are evicted first; entries that a running sequence started
from stay, and so do reserved ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from softprompt.families import KeysValues
from softprompt.prompt import SoftPrompt

BLOCK = 16  # tokens; texts are shared in whole blocks
_RESERVED_SHARE = 0.5  # of the budget, at most, for reserved entries
_MAX_REQUESTED = 100_000  # keys of texts that are remembered without their keys and values

Key = bytes


@dataclass(eq=False)
class Prefix:
    """The first positions of a sequence: [k, length, d] keys and values of each attention module."""

    states: dict[nn.Module, KeysValues]
    length: int
    pins: int = 0  # running sequences that started from it

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for pair in self.states.values() for part in pair)


class PrefixCache:
    """A least-recently-used cache within a byte budget; pinned entries count and stay."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self.entries: OrderedDict[Key, Prefix] = OrderedDict()
        self._requested: OrderedDict[Key, None] = OrderedDict()
        self._reserved: dict[Key, int] = {}  # bytes of entries that are never evicted, computed or not yet

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def pin(self, keys: Sequence[Key]) -> Prefix | None:
        """The entry of the first of the keys that has one, pinned."""
        for key in keys:
            found = self.entries.get(key)
            if found is not None:
                self.entries.move_to_end(key)
                found.pins += 1
                self.num_hits += 1
                return found
        self.num_misses += 1
        return None

    def unpin(self, prefix: Prefix) -> None:
        assert prefix.pins > 0
        prefix.pins -= 1
        self._evict_for(0)

    def put(self, key: Key, prefix: Prefix) -> None:
        """Keep it, if it fits beside what is pinned."""
        if key in self.entries or not self._evict_for(prefix.num_bytes):
            return
        self.entries[key] = prefix
        self.num_bytes += prefix.num_bytes

    def reserve(self, key: Key, num_bytes: int) -> bool:
        """Never evict this entry, once it is there; False if reserved entries would exceed half the budget."""
        others = sum(self._reserved.values()) - self._reserved.get(key, 0)
        if others + num_bytes > self.budget_bytes * _RESERVED_SHARE:
            return False
        self._reserved[key] = num_bytes
        return True

    def release(self, key: Key) -> None:
        """Undo `reserve`; without one, nothing happens."""
        self._reserved.pop(key, None)

    def was_requested(self, key: Key) -> bool:
        """Whether this was asked before, by any sequence; from now on it was."""
        found = key in self._requested
        self._requested[key] = None
        self._requested.move_to_end(key)
        if len(self._requested) > _MAX_REQUESTED:
            self._requested.popitem(last=False)
        return found

    def check_integrity(self) -> None:
        """Counts and sizes are those of the entries. Raises AssertionError."""
        assert self.num_bytes == sum(entry.num_bytes for entry in self.entries.values())
        assert all(entry.pins >= 0 for entry in self.entries.values())
        assert self.num_bytes <= self.budget_bytes
        assert sum(self._reserved.values()) <= self.budget_bytes * _RESERVED_SHARE

    @property
    def num_pins(self) -> int:
        return sum(entry.pins for entry in self.entries.values())

    @property
    def num_reserved(self) -> int:
        """Entries that are never evicted, computed or not yet."""
        return len(self._reserved)

    def _evict_for(self, num_bytes: int) -> bool:
        """Make space for an entry by evicting others; if that cannot succeed, evict none and return False."""
        missing = self.num_bytes + num_bytes - self.budget_bytes
        evicted = self._oldest(missing)
        if sum(self.entries[key].num_bytes for key in evicted) < missing:
            return False
        for key in evicted:
            self.num_bytes -= self.entries.pop(key).num_bytes
        return True

    def _oldest(self, num_bytes: int) -> list[Key]:
        """Entries that may be evicted, enough to free so many bytes if there are."""
        found: list[Key] = []
        for key, entry in self.entries.items():
            if num_bytes <= 0:
                break
            if not entry.pins and key not in self._reserved:
                found.append(key)
                num_bytes -= entry.num_bytes
        return found


def prompt_key(prompt: SoftPrompt) -> Key:
    """The key of a soft prompt without a text."""
    (_, key), *_ = prefix_keys(prompt, (0,))
    return key


def prefix_keys(
    prompt: SoftPrompt | None, ids: Sequence[int], is_repeated: bool = False, salt: str | None = None
) -> list[tuple[int, Key]]:
    """Lengths and keys of the prefixes that other sequences may have too, the shortest first.

    The soft prompt, the same for every salt, and whole blocks of the text behind it; where the same text `is_repeated`
    (several choices), all of it but the last token, which every sequence runs itself.
    """
    num_virtual = 0 if prompt is None else prompt.num_virtual_tokens
    lengths = list(range(BLOCK, len(ids), BLOCK))
    if is_repeated and len(ids) > 1 and lengths[-1:] != [len(ids) - 1]:
        lengths.append(len(ids) - 1)
    digest = hashlib.sha256(b"" if prompt is None else prompt.content_hash.encode())
    keys = [(num_virtual, digest.digest())] if prompt is not None and ids else []
    if salt is not None:
        digest.update(hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest())
    start = 0
    for length in lengths:
        digest.update(np.asarray(ids[start:length], dtype=np.int64).tobytes())
        keys.append((num_virtual + length, digest.digest()))
        start = length
    return keys
