"""What one token says, as text and as bytes, for reports of log-probabilities."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from softprompt.base import Base

_BROKEN = "\ufffd"  # what decoders print for bytes that are no whole character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD = "a"
_KEPT = 2**16  # tokens


class TokenText(NamedTuple):
    """One token behind other text."""

    text: str  # "bytes:\\xe4" for a part of a character
    raw: bytes


class TokenTexts:
    """The tokens of one base; those that were asked for are remembered."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._before = _word(base)
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self.of = lru_cache(_KEPT)(self._of)
        self.said = lru_cache(_KEPT)(self._said)

    def _said(self, token: int) -> bytes:
        """What it puts into a text: nothing where it is special, though it has a name."""
        return self.of(token).raw if self._base.decode_after(self._before, (token,)) else b""

    def _of(self, token: int) -> TokenText:
        text = self._base.decode_after(self._before, (token,))
        if not text:  # a special token, or one that says nothing
            text = self._name(token)
        raw = self._raw(token) if _BROKEN in text else None
        if raw is None:
            return TokenText(text, text.encode())
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def _raw(self, token: int) -> bytes | None:
        """The bytes of a token that is no whole character; None where the tokenizer keeps none."""
        name = self._name(token)
        spelt = _BYTE_TOKEN.fullmatch(name)
        if spelt is not None:
            return bytes([int(spelt[1], 16)])
        if name and all(character in self._bytes for character in name):
            return bytes(self._bytes[character] for character in name)
        return None

    def _name(self, token: int) -> str:
        name = self._base.tokenizer.convert_ids_to_tokens(token) if token < len(self._base.tokenizer) else None
        return name if isinstance(name, str) else ""


def _word(base: Base) -> tuple[int, ...]:
    """A token that is a word: some tokenizers drop a space at the very start of a text, or write one between tokens."""
    usual = base.encode(_WORD)[-1:] if base.can_encode(_WORD) else ()
    candidates = (*usual, *range(base.vocab_size))
    return next(((token,) for token in candidates if base.decode((token,)).strip().isalnum()), ())
