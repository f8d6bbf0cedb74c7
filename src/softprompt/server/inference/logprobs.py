"""Log-probabilities as the two endpoints write them: tokens as text, their bytes and their offsets in the answer.

Nats under the raw distribution, before penalties and temperature.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from softprompt.base import Base
from softprompt.engine import TokenLogProb

_BROKEN = "\ufffd"  # what decoders print for bytes that are no whole character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD = "a"
_NUM_CACHED = 2**16  # tokens
_LEAST = -9999.0  # JSON has no infinity
_REACH = 64  # bytes searched for a token after something that the tokenizer changed or did not know

Json = dict[str, Any]  # Any: JSON
LogprobsFormatter = Callable[[Sequence[TokenLogProb]], Json]
"""Formats the next tokens of one answer."""


class TokenText(NamedTuple):
    """One token as it reads after other text."""

    text: str  # "bytes:\\xe4" for part of a character
    raw: bytes


class TokenTexts:
    """The texts of one base's tokens, cached."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._before = _word(base)
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self.of = lru_cache(_NUM_CACHED)(self._of)
        self.printed = lru_cache(_NUM_CACHED)(self._printed)

    def _printed(self, token: int) -> bytes:
        """What the token adds to a text: nothing if it is special, although it has a name."""
        return self.of(token).raw if self._base.decode_after(self._before, (token,)) else b""

    def _of(self, token: int) -> TokenText:
        text = self._base.decode_after(self._before, (token,))
        if not text:  # a special token, or one that prints nothing
            text = self._name(token)
        raw = self._raw(token) if _BROKEN in text else None
        if raw is None:
            return TokenText(text, text.encode())
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def _raw(self, token: int) -> bytes | None:
        """The bytes of a token that is no whole character; None if the tokenizer does not have them."""
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
    """A token that is a word: some tokenizers drop a space at the start of a text, or write one between tokens."""
    usual = base.encode(_WORD)[-1:] if base.can_encode(_WORD) else ()
    candidates = (*usual, *range(base.vocab_size))
    return next(((token,) for token in candidates if base.decode((token,)).strip().isalnum()), ())


class CompletionLogprobs:
    """Formats one answer's tokens for /v1/completions: parallel lists, with each token's offset in the text."""

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        """`offset`: characters before the answer."""
        self._texts = texts
        self._offset = offset

    def __call__(self, log_probs: Sequence[TokenLogProb]) -> Json:
        offsets = [self._next_offset(self._texts.printed(each.id)) for each in log_probs]
        return _lists(self._texts, [each.id for each in log_probs], log_probs, offsets)

    def _next_offset(self, printed: bytes) -> int:
        here = self._offset
        self._offset += sum(not _is_continuation(byte) for byte in printed)
        return here - (printed != b"" and _is_continuation(printed[0]))


def prompt_logprobs(texts: TokenTexts, ids: Sequence[int], text: str, log_probs: Sequence[TokenLogProb | None]) -> Json:
    """The same lists for a prompt: `ids` as the model read them, and the text in which their offsets are."""
    return _lists(texts, ids, log_probs, text_offsets(text, [texts.printed(token) for token in ids]))


def concatenated(first: Json, second: Json) -> Json:
    """The lists of `first`, each followed by that of `second`."""
    return {key: first[key] + second[key] for key in first}


def _lists(texts: TokenTexts, ids: Sequence[int], log_probs: Sequence[TokenLogProb | None], offsets: list[int]) -> Json:
    return {
        "tokens": [texts.of(token).text for token in ids],
        "token_logprobs": [None if each is None else _finite(each.log_prob) for each in log_probs],
        "top_logprobs": [None if each is None else _top(texts, each) for each in log_probs],
        "text_offset": offsets,
    }


def _top(texts: TokenTexts, each: TokenLogProb) -> dict[str, float]:
    found = {texts.of(each.id).text: _finite(each.log_prob)}
    for token, log_prob in each.alternatives:
        found.setdefault(texts.of(token).text, _finite(log_prob))
    return found


class ChatLogprobs:
    """Formats one answer's tokens for /v1/chat/completions: one object per token."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def __call__(self, log_probs: Sequence[TokenLogProb]) -> Json:
        return {"content": [self._token(each) for each in log_probs], "refusal": None}

    def _token(self, each: TokenLogProb) -> Json:
        top = [self._one(token, log_prob) for token, log_prob in each.alternatives]
        return {**self._one(each.id, each.log_prob), "top_logprobs": top}

    def _one(self, token: int, log_prob: float) -> Json:
        text, raw = self._texts.of(token)
        return {"token": text, "logprob": _finite(log_prob), "bytes": list(raw)}


def _finite(log_prob: float) -> float:
    return max(log_prob, _LEAST)


def text_offsets(text: str, printed: Sequence[bytes]) -> list[int]:
    """Characters of `text` before each token; `printed`: what each token adds to a text.

    A leading space belongs to its token. A token that begins inside a character gets that character's offset.
    """
    data = text.encode()
    begun = [*accumulate(not _is_continuation(byte) for byte in data), len(text) + 1]
    found, at = [], 0
    for token in printed:
        start, at = _find_token(data, token, at)
        found.append(begun[start] - 1)
    return found


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80  # UTF-8: all bytes of a character but its first


def _find_token(data: bytes, printed: bytes, at: int) -> tuple[int, int]:
    """Start and end of a token that lies at `at` or soon after it; empty at `at` if it is not there."""
    if data.startswith(printed, at):
        return at, at + len(printed)
    for wanted in (printed, printed.strip()):  # tokenizers drop and add spaces
        start = data.find(wanted, at, at + len(wanted) + _REACH)
        if start >= 0:
            return at if not data[at:start].strip() else start, start + len(wanted)
    return at, at
