"""Where tokens begin in a text, in characters.

A space that a token brings belongs to it. One that begins in the midst of a character begins where that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_REACH = 64  # bytes in which a token is looked for behind something that the tokenizer changed or did not know


def offsets(words: str, said: Sequence[bytes]) -> list[int]:
    """Characters of `words` before each token; `said`: what each token puts into a text."""
    data = words.encode()
    begun = [*accumulate(not _is_within(byte) for byte in data), len(words) + 1]
    found, at = [], 0
    for token in said:
        start, at = _place(data, token, at)
        found.append(begun[start] - 1)
    return found


def num_begun(said: bytes) -> int:
    """Characters that begin in what a token says."""
    return sum(not _is_within(byte) for byte in said)


def starts_within(said: bytes) -> bool:
    """Whether it begins in the midst of a character."""
    return said != b"" and _is_within(said[0])


def _is_within(byte: int) -> bool:
    return byte & 0xC0 == 0x80  # UTF-8: none but a character's later bytes


def _place(data: bytes, said: bytes, at: int) -> tuple[int, int]:
    """From where to where a token reaches that comes at `at` or soon behind it; nowhere if it is not there."""
    if data.startswith(said, at):
        return at, at + len(said)
    for wanted in (said, said.strip()):  # tokenizers drop and add spaces
        start = data.find(wanted, at, at + len(wanted) + _REACH)
        if start >= 0:
            return at if not data[at:start].strip() else start, start + len(wanted)
    return at, at
