"""The text of an answer, token by token, as far as it can be printed. Knows neither requests nor tensors.

All pieces together are `Base.decode_after` of the whole answer, cut before the first stop string. A token costs the
same however long the text and the answer are: only a window of ids is decoded, the first few of the text (where
some tokenizers drop a space) and the last few. What lies between changes nothing about the end.

One limit: a ByteFallback decoder turns a whole run of byte tokens into U+FFFD when one byte of it is wrong. The text of
a run is held back until the run ends, but over `_LONGEST_RUN` tokens at most; characters printed by then stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from softprompt.base import Base

_BROKEN = "\ufffd"  # what decoders print for bytes that are no character, or not yet one
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_RUN = 16  # byte tokens: four emoji, or half a line of a script that the vocabulary lacks
_LONGEST_CHARACTER = 4  # bytes
_RECENT = 6  # ids before the new one that are decoded with it
_RECENT_OF_TEXT = 32  # the same at the answer's start: some decoders hold spaces back until a word follows
_GROWTH = 8  # ids by which the window may grow before it is cut again
_LONGEST_LEAD = 32  # ids searched at the start for something printed


class Detokenizer:
    """What of an answer may be printed: no part of a character, no part of a stop string."""

    def __init__(self, base: Base, text_ids: Sequence[int], stop: Sequence[str] = (), min_new_tokens: int = 0) -> None:
        self.stopped_by: str | None = None  # the first stop string; of two that begin together the shorter one
        self._decoder = _IncrementalDecoder(base, text_ids)
        self._stop = tuple(stop)
        self._num_unchecked = min_new_tokens  # tokens to come whose text is not searched for stop strings
        self._undecided = ""  # certain, but perhaps the beginning of a stop string
        self._num_ignored = 0  # undecided characters in which no stop string may end
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was printed so far."""
        return "".join(self._pieces)

    def append(self, token: int) -> str:
        """What can be printed now; nothing after a stop string was found.

        As in vLLM, a stop string counts when it ends behind the text of the first `min_new_tokens` tokens.
        """
        if self.stopped_by is not None:
            return ""
        self._undecided += self._decoder.append(token)
        if self._num_unchecked > 0:
            self._num_unchecked -= 1
            self._num_ignored = len((self._undecided + self._decoder.rest).rstrip(_BROKEN))
        elif (stop_pos := self._find_stop()) is not None:
            return self._print((self._undecided + self._decoder.rest)[:stop_pos])
        return self._print(self._undecided[: len(self._undecided) - self._num_begun()])

    def finish(self) -> str:
        """The undecided rest, when the answer has ended."""
        rest, self._decoder.rest = self._decoder.rest, ""
        return "" if self.stopped_by is not None else self._print(self._undecided + rest)

    def _print(self, piece: str) -> str:
        self._undecided = self._undecided[len(piece) :]
        self._num_ignored = max(0, self._num_ignored - len(piece))
        self._pieces.append(piece)
        return piece

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in what is not printed yet, certain or not."""
        unprinted = self._undecided + self._decoder.rest
        starts = [unprinted.find(stop, max(0, self._num_ignored - len(stop) + 1)) for stop in self._stop]
        found = [(start, len(stop), stop) for start, stop in zip(starts, self._stop, strict=True) if start >= 0]
        if not found:
            return None
        start, _, self.stopped_by = min(found)
        return start

    def _num_begun(self) -> int:
        """Length of the longest end of the undecided text that begins a stop string."""
        return max((_overlap(self._undecided, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class _IncrementalDecoder:
    """The text of ids behind a text, split into what is certain and the rest, which later ids may change."""

    def __init__(self, base: Base, text_ids: Sequence[int]) -> None:
        self.rest = ""
        self._base = base
        special = set(base.tokenizer.all_special_ids)
        visible = [token for token in text_ids if token not in special]
        self._ids = self._window(visible, _RECENT_OF_TEXT)
        self._num_before = len(self._ids)
        self._head = base.decode(self._ids)  # "" as soon as text behind it is certain
        self._num_certain = len(self._head)  # characters of the window
        self._num_bytes = 0  # byte tokens in the run that is open
        self._longest = len(self._ids) + _GROWTH

    def append(self, token: int) -> str:
        """The text that has become certain."""
        before, self._ids = self._ids, [*self._ids, token]
        start, new = self._new_text()
        if new == self.rest and self._is_nothing(token, before):
            self._ids = before
            return ""
        self._num_bytes = self._num_bytes + 1 if self._is_byte(token) else 0
        certain = new[: self._size_of_certain(new)]
        self.rest = new[len(certain) :]
        if certain:
            self._advance(start, len(certain))
        return certain

    def _new_text(self) -> tuple[int, str]:
        """From which id of the window on, and what is new, as in `Base.decode_after`."""
        whole = self._base.decode(self._ids)
        if whole.startswith(self._head):
            return 0, whole[self._num_certain :]
        return self._num_before, self._base.decode(self._ids[self._num_before :])

    def _size_of_certain(self, new: str) -> int:
        is_broken = new.endswith(_BROKEN)
        if self._num_bytes > 0:
            is_long = self._num_bytes >= _LONGEST_RUN + (_LONGEST_CHARACTER - 1 if is_broken else 0)
            return len(new) if is_long else 0
        # byte-level decoders print one U+FFFD for the beginning of a character; subword-nmt's join words at "@@ "
        return len(new) - (1 if is_broken else 2 if new.endswith("@@") else 0)

    def _advance(self, start: int, num_certain: int) -> None:
        self._num_certain = num_certain + (0 if start > 0 else self._num_certain)
        self._ids = self._ids[start:]
        self._head = ""
        if self._num_bytes > 0 or len(self._ids) > self._longest:
            self._num_bytes = 0
            self._shorten()

    def _shorten(self) -> None:
        ids = self._window(self._ids, _RECENT)
        self._num_certain = len(self._base.decode(ids)) - len(self.rest)
        self._ids, self._longest = ids, len(ids) + _GROWTH

    def _window(self, ids: Sequence[int], num_recent: int) -> list[int]:
        """Ids whose text goes on as that of all `ids` does. No part of an open run of byte tokens: all or nothing."""
        num_bytes = next((num for num in range(_LONGEST_RUN) if not self._is_byte_at(ids, -1 - num)), _LONGEST_RUN)
        num_last = 0 if num_bytes == _LONGEST_RUN else num_bytes + num_recent
        num_first = self._num_first(ids)
        return [*ids[:num_first], *ids[max(num_first, len(ids) - num_last) :]]

    def _num_first(self, ids: Sequence[int]) -> int:
        """How many ids from the start, up to something printed: what follows them is not the start of a text."""
        for num in range(1, min(len(ids), _LONGEST_LEAD)):
            text = self._base.decode(tuple(ids[:num]))
            if text and not text.endswith(_BROKEN):
                return num
        return min(len(ids), _LONGEST_LEAD)

    def _is_nothing(self, token: int, ids: list[int]) -> bool:
        """Whether it is left out of the text: a special token, but neither half a character nor a space at an edge."""
        return self._base.decode([*ids, token, *ids]) == self._base.decode([*ids, token, token, token, *ids])

    def _is_byte_at(self, ids: Sequence[int], pos: int) -> bool:
        return len(ids) >= -pos and self._is_byte(ids[pos])

    def _is_byte(self, token: int) -> bool:
        name = self._base.tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None
