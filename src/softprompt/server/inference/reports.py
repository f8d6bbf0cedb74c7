"""Log-probabilities as the two endpoints write them; nats under the raw distribution, before penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from softprompt.engine import TokenLogProb
from softprompt.server.inference.offsets import num_begun, offsets, starts_within
from softprompt.server.inference.token_text import TokenTexts

_LEAST = -9999.0  # JSON has no infinity

Report = dict[str, Any]  # Any: JSON
Reporter = Callable[[Sequence[TokenLogProb]], Report]
"""Writes the next tokens of one answer."""
Echo = Callable[[int, Sequence[TokenLogProb | None]], Report]
"""Writes the text of one request."""


class CompletionReporter:
    """/v1/completions: parallel lists, with each token's place in the answer's text."""

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        """`offset`: characters before the answer."""
        self._texts = texts
        self._offset = offset

    def __call__(self, log_probs: Sequence[TokenLogProb]) -> Report:
        places = [self._next_offset(self._texts.said(each.id)) for each in log_probs]
        return _lists(self._texts, [each.id for each in log_probs], log_probs, places)

    def _next_offset(self, said: bytes) -> int:
        here = self._offset
        self._offset += num_begun(said)
        return here - starts_within(said)


def text_report(texts: TokenTexts, ids: Sequence[int], words: str, log_probs: Sequence[TokenLogProb | None]) -> Report:
    """The same lists of a text: `ids` as the model read them, and the words in which their places are."""
    return _lists(texts, ids, log_probs, offsets(words, [texts.said(token) for token in ids]))


def joined(first: Report, second: Report) -> Report:
    """Two such reports, one behind the other."""
    return {key: first[key] + second[key] for key in first}


def _lists(
    texts: TokenTexts, ids: Sequence[int], log_probs: Sequence[TokenLogProb | None], places: list[int]
) -> Report:
    return {
        "tokens": [texts.of(token).text for token in ids],
        "token_logprobs": [None if each is None else _finite(each.log_prob) for each in log_probs],
        "top_logprobs": [None if each is None else _top(texts, each) for each in log_probs],
        "text_offset": places,
    }


def _top(texts: TokenTexts, each: TokenLogProb) -> dict[str, float]:
    found = {texts.of(each.id).text: _finite(each.log_prob)}
    for token, log_prob in each.alternatives:
        found.setdefault(texts.of(token).text, _finite(log_prob))
    return found


class ChatReporter:
    """/v1/chat/completions: one object per token."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def __call__(self, log_probs: Sequence[TokenLogProb]) -> Report:
        return {"content": [self._token(each) for each in log_probs], "refusal": None}

    def _token(self, each: TokenLogProb) -> Report:
        top = [self._one(token, log_prob) for token, log_prob in each.alternatives]
        return {**self._one(each.id, each.log_prob), "top_logprobs": top}

    def _one(self, token: int, log_prob: float) -> Report:
        text, raw = self._texts.of(token)
        return {"token": text, "logprob": _finite(log_prob), "bytes": list(raw)}


def _finite(log_prob: float) -> float:
    return max(log_prob, _LEAST)
