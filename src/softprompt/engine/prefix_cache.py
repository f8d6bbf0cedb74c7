"""Keys and values of soft prompts, and of texts that several requests begin with: computed once, kept within a budget.

Entries go by what was run: the soft prompt's content and the token ids behind it. Those with token ids also go by the
request's salt: how soon an answer comes tells whether its text was cached, so only requests with one salt share a text.
The least recently used go first; an entry that a running row came from stays, and so does what is kept on purpose.
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

BLOCK = 16  # tokens of a text that are shared or not
_KEPT_SHARE = 0.5  # of the budget, at most, for what is kept on purpose
_MOST_SEEN = 100_000  # beginnings of texts that are remembered without their keys and values

Key = bytes


@dataclass(eq=False)
class Prefix:
    """The first positions of a row: [k, length, d] keys and values of each attention module."""

    states: dict[nn.Module, KeysValues]
    length: int
    pins: int = 0  # running rows that came from it

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for pair in self.states.values() for part in pair)


class PrefixCache:
    """A byte-budgeted, least-recently-used cache; what is pinned counts and stays."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._entries: OrderedDict[Key, Prefix] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._kept: dict[Key, int] = {}  # bytes of what never goes, here or still to come

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def pin(self, keys: Sequence[Key]) -> Prefix | None:
        """The first of the keys that is here, pinned."""
        for key in keys:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                found.pins += 1
                self.num_hits += 1
                return found
        self.num_misses += 1
        return None

    def unpin(self, prefix: Prefix) -> None:
        assert prefix.pins > 0
        prefix.pins -= 1
        self._make_room(0)

    def put(self, key: Key, prefix: Prefix) -> None:
        """Keep it, if it fits beside what is pinned."""
        if key in self._entries or not self._make_room(prefix.num_bytes):
            return
        self._entries[key] = prefix
        self.num_bytes += prefix.num_bytes

    def keep(self, key: Key, num_bytes: int) -> bool:
        """Whether an entry of so many bytes never goes once it has come: all of these have half of the budget."""
        others = sum(self._kept.values()) - self._kept.get(key, 0)
        if others + num_bytes > self.budget_bytes * _KEPT_SHARE:
            return False
        self._kept[key] = num_bytes
        return True

    def let_go(self, key: Key) -> None:
        """It may go again. One that was not kept is let be."""
        self._kept.pop(key, None)

    def was_seen(self, key: Key) -> bool:
        """Whether somebody asked this before; from now on somebody has."""
        found = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return found

    def check_integrity(self) -> None:
        """What it counts is what it holds. Raises AssertionError."""
        assert self.num_bytes == sum(entry.num_bytes for entry in self._entries.values())
        assert all(entry.pins >= 0 for entry in self._entries.values())
        assert self.num_bytes <= self.budget_bytes
        assert sum(self._kept.values()) <= self.budget_bytes * _KEPT_SHARE

    @property
    def num_pins(self) -> int:
        return sum(entry.pins for entry in self._entries.values())

    def _make_room(self, num_bytes: int) -> bool:
        """Whether there is room; those that were used least recently go for it, but none in vain."""
        missing = self.num_bytes + num_bytes - self.budget_bytes
        going = self._oldest(missing)
        if sum(self._entries[key].num_bytes for key in going) < missing:
            return False
        for key in going:
            self.num_bytes -= self._entries.pop(key).num_bytes
        return True

    def _oldest(self, num_bytes: int) -> list[Key]:
        """Entries that may go, enough to free so many bytes if there are."""
        found: list[Key] = []
        for key, entry in self._entries.items():
            if num_bytes <= 0:
                break
            if not entry.pins and key not in self._kept:
                found.append(key)
                num_bytes -= entry.num_bytes
        return found


def shared_beginnings(
    prompt: SoftPrompt | None, ids: Sequence[int], is_asked_again: bool = False, salt: str | None = None
) -> list[tuple[int, Key]]:
    """Positions and keys of what other rows may begin with too, the shortest first.

    The soft prompt, the same for every salt, and whole blocks of the text behind it; where the same text
    `is_asked_again`, all of it but the last token, which every row runs itself.
    """
    num_virtual = 0 if prompt is None else prompt.num_virtual_tokens
    lengths = list(range(BLOCK, len(ids), BLOCK))
    if is_asked_again and len(ids) > 1 and lengths[-1:] != [len(ids) - 1]:
        lengths.append(len(ids) - 1)
    digest = hashlib.sha256(b"" if prompt is None else prompt.content_hash.encode())
    beginnings = [(num_virtual, digest.digest())] if prompt is not None and ids else []
    if salt is not None:
        digest.update(hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest())
    done = 0
    for length in lengths:
        digest.update(np.asarray(ids[done:length], dtype=np.int64).tobytes())
        beginnings.append((num_virtual + length, digest.digest()))
        done = length
    return beginnings
